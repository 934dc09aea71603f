"""What a run counts and reports: counters, log, speed, loss spikes, and the summary at the end.

`Progress` holds the counters that are part of each checkpoint. `Monitor` shows them in a progress bar, writes
`metrics.jsonl`, tells the trackers of Accelerate, and after each evaluation prints a table and draws `evaluation.png`.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers.utils import logging

from ..devices import matrix_product_rate
from ..files import parse_json, to_json, write_file
from ..processes import on_main_process
from ..report.plots import plot_evaluations
from ..report.tables import text_table
from ..search.measures import MEASURES
from .arguments import SuperPretrainingArguments
from .checkpoints import FREE_SPACE, explained
from .distillation import OUTPUT_WEIGHTS


logger = logging.get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "training_summary.json"
PLOT_FILE = "evaluation.png"
SPIKE_WINDOW = 50  # steps whose losses a new loss is compared with
SPIKE_DEVIATIONS = 6.0


@dataclass
class Progress:
    """Counters of a run over all processes. They are part of each checkpoint."""

    step: int = 0
    sequences: int = 0
    tokens: int = 0  # without padding
    padded_tokens: int = 0  # with padding
    labelled: int = 0
    flops: float = 0.0  # operations of the model's matrix products, forward and backward
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    best_loss: float | None = None  # mean over the evaluated shapes; without labels the mean distance
    best_step: int | None = None
    perplexity: float | None = None  # of the first shape at the last evaluation, if it was finite
    loss_spikes: list[dict[str, float]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)  # `step`, `name`, `before`, `after` of each condition

    def watch(self, loss: float) -> bool:
        """Remember a step's loss; return whether it is a spike: far above the losses before it."""
        recent = self.recent_losses
        spike = False
        if math.isfinite(loss):
            if len(recent) >= SPIKE_WINDOW:
                mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
                spike = loss > mean + SPIKE_DEVIATIONS * deviation
                if spike:
                    self.loss_spikes.append({"step": self.step, "loss": loss, "mean_before": mean})
            self.recent_losses = [*recent, loss][-SPIKE_WINDOW:]
        return spike


@dataclass
class TrainingSummary:
    """How a run ended. `status` is "finished", "interrupted" or "target reached".

    Attributes:
        log_history: One entry per logged step: `step`, `loss` of each trained shape (in nats, or without labels the
            error of its last hidden state), `learning_rate`, `gradient_norm`, `tokens_per_second`, `share_of_peak`; and
            one per evaluation: `step`, `evaluation`.
    """

    status: str
    progress: Progress
    arguments: dict[str, Any]
    processes: int
    device: str
    parameters: int
    log_history: list[dict[str, Any]]

    @property
    def evaluation(self) -> dict[str, dict[str, float]]:
        """The last evaluation by name of shape: loss, perplexity, accuracy, or without labels distance and cosine."""
        return next((entry["evaluation"] for entry in reversed(self.log_history) if "evaluation" in entry), {})

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the entries of single steps, which are in `metrics.jsonl`."""
        return {
            "status": self.status,
            **{
                key: value for key, value in asdict(self.progress).items() if key not in ("recent_losses", "perplexity")
            },
            "processes": self.processes,
            "device": self.device,
            "parameters": self.parameters,
            "evaluation": self.evaluation,
            "arguments": self.arguments,
        }

    def describe(self) -> str:
        """Return the section on training of a model card, in Markdown."""
        args, progress = self.arguments, self.progress
        batch = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * self.processes
        what = {
            "sandwich": f"the largest shape, the smallest and {args['random_shapes']} random one(s) per step",
            "smallest": f"the smallest shape and {args['random_shapes']} random one(s) per step",
            "random": f"{args['random_shapes']} random shape(s) per step",
            "fixed": "one shape only",
        }[args["sampling"]]
        goal, details = self._describe_losses()
        return (
            f"{goal}, {what}. {progress.step:,} steps of {batch:,} sequences: {progress.tokens:,} "
            f"tokens, {progress.flops:.2e} FLOPs, {progress.seconds / 3600:.2f} hours on {self.processes} x "
            f"{self.device}. AdamW, peak learning rate {args['learning_rate']:g} ({args['lr_scheduler_type']}), "
            f"{', '.join(details)}, precision {args['mixed_precision']}, seed {args['seed']}.{self._describe_changes()}"
        )

    def _describe_losses(self) -> tuple[str, list[str]]:
        """Return what the shapes learnt, and the options that decided it."""
        args, goals, details = self.arguments, [], []
        if args["mlm_probability"] > 0:
            goals.append("masked language modelling")
            details.append(f"masking {args['mlm_probability']:.0%}")
            details.append(f"distillation weight {args['distillation_weight']:g}")
        if any(args[name] > 0 for name in OUTPUT_WEIGHTS):
            goals.append("distillation from a frozen model")
            details.append(f"weights {args['state_weight']:g} of the last hidden state")
            details.append(f"{args['pooled_weight']:g} of its pooled form ({args['pooling']})")
            details.append(f"{args['first_token_weight']:g} of the first token's")
            details.append(f"{args['teacher_weight']:g} of attention relations")
        if args["shared_learning_rate_scale"] != 1:
            details.append(f"{args['shared_learning_rate_scale']:g} of the learning rate for shared weights")
        if args["no_dropout"]:
            details.append("no dropout")
        goal = " and ".join(goals)
        return goal[0].upper() + goal[1:], details

    def _describe_changes(self) -> str:
        changes = "; ".join(
            f"after step {change['step']:,}, {change['name']} was changed from {change['before']} to {change['after']}"
            for change in self.progress.changes
        )
        return f" The run went on under changed conditions: {changes}." if changes else ""


class Monitor:
    """Shows a run on the main process. On the other processes it only keeps the same log.

    Args:
        accelerator: Connects the processes, and holds the trackers.
        args: `output_dir`, `logging_steps`, `max_steps` and `report_to` are used.
        progress: The counters, fresh or from a checkpoint.
        description: Label of the progress bar.
    """

    def __init__(
        self, accelerator: Accelerator, args: SuperPretrainingArguments, progress: Progress, description: str
    ) -> None:
        self.accelerator, self.args, self.progress = accelerator, args, progress
        self.folder = None if args.output_dir is None else Path(args.output_dir)
        self.log_history = on_main_process(self._log_so_far, accelerator) or []
        self.peak = self._rate() * accelerator.num_processes
        self.bar = tqdm(
            total=args.max_steps,
            initial=progress.step,
            desc=description,
            disable=not accelerator.is_local_main_process,
        )
        self.last_time = time.perf_counter()
        self.started = self.last_time - progress.seconds
        self.last_tokens, self.last_flops = progress.tokens, progress.flops
        if args.report_to:
            accelerator.init_trackers("supershaper", config={k: str(v) for k, v in vars(args).items()})

    def _rate(self) -> float:
        """Measure the rate of one process, in FLOP/s. Warn of a processor that is faster in float32.

        One without instructions for bfloat16 (on x86: AVX512_BF16 or AMX) was 7 times slower in it.
        """
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        rate = matrix_product_rate(device, precision)
        if device.type == "cpu" and precision != "no" and (full := matrix_product_rate(device)) > rate:
            logger.warning(
                f"This processor multiplies matrices in {precision} at {rate / 1e9:.0f} GFLOP/s, in float32 at "
                f"{full / 1e9:.0f} GFLOP/s. mixed_precision='no' is faster."
            )
        return rate

    def step(self, losses: Sequence[float], learning_rate: float, gradient_norm: float) -> None:
        """Show the step just done: the `losses` of its shapes, over all processes."""
        progress = self.progress
        progress.seconds = time.perf_counter() - self.started
        if progress.watch(losses[0]):
            spike = progress.loss_spikes[-1]
            self._say(f"Step {progress.step}: the loss is {losses[0]:.2f}, up from {spike['mean_before']:.2f}.")
        self.bar.update()
        if progress.step % self.args.logging_steps and progress.step != self.args.max_steps:
            return
        now = time.perf_counter()
        elapsed = now - self.last_time
        speed = (progress.tokens - self.last_tokens) / elapsed
        share = (progress.flops - self.last_flops) / elapsed / self.peak
        self.last_time, self.last_tokens, self.last_flops = now, progress.tokens, progress.flops
        self.bar.set_postfix_str(f"loss {losses[0]:.3f}, {speed:,.0f} tokens/s, {share:.0%} of peak")
        entry = {
            "step": progress.step,
            "loss": list(losses),
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "tokens_per_second": speed,
            "share_of_peak": share,
        }
        self._log(entry)
        self._track({"loss": losses[0], **{f"loss_{i}": loss for i, loss in enumerate(losses)}}, entry)

    def evaluated(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Show an evaluation: what was measured of each shape, by its name."""
        self._log({"step": self.progress.step, "evaluation": results})
        rows = [{"shape": name, **row} for name, row in results.items()]
        self._say(f"Evaluation after step {self.progress.step}:\n{text_table(rows)}")
        if self.folder is not None:
            file = self.folder / PLOT_FILE
            on_main_process(lambda: draw_evaluations(file, self.log_history), self.accelerator)
        self._track({f"eval/{name}/{key}": value for name, row in results.items() for key, value in row.items()}, {})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside this context, which evaluates and saves, out of the training speed."""
        start = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - start

    def close(self) -> None:
        """End the bar and the trackers.

        `Accelerator.end_training` is not called: it would also disconnect the processes, which still have to save.
        """
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _log_so_far(self) -> list[dict[str, Any]]:
        """Read back the log up to the step to resume from, and remove later entries from the file.

        A crash may have left entries of later steps, and half a line at the end. Any other damaged line is left out
        with a warning.
        """
        if self.folder is None:
            return []
        file = self.folder / METRICS_FILE
        *lines, _ = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else [""]
        read = [read_entry(line) for line in lines]
        damaged = [number for number, entry in enumerate(read, start=1) if entry is None]
        if damaged:
            logger.warning(f"{file} has damaged lines, which are left out: {', '.join(map(str, damaged))}.")
        entries = [entry for entry in read if entry is not None and entry["step"] <= self.progress.step]
        self.folder.mkdir(parents=True, exist_ok=True)
        with explained(file, lambda: FREE_SPACE):
            write_file(file, "".join(f"{json.dumps(entry)}\n" for entry in entries))
        return entries

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def _log(self, entry: dict[str, Any]) -> None:
        self.log_history.append(entry)
        if self.folder is not None:
            file = self.folder / METRICS_FILE
            on_main_process(lambda: append_entry(file, entry), self.accelerator)

    def _track(self, values: Mapping[str, float], entry: Mapping[str, Any]) -> None:
        if self.args.report_to:
            numbers = {key: value for key, value in entry.items() if isinstance(value, float)}
            self.accelerator.log({**values, **numbers}, step=self.progress.step)


def append_entry(file: Path, entry: Mapping[str, Any]) -> None:
    with explained(file, lambda: FREE_SPACE), file.open("a", encoding="utf-8", newline="\n") as stream:
        stream.write(f"{to_json(entry)}\n")


def draw_evaluations(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    with explained(file, lambda: FREE_SPACE):
        plot_evaluations(file, entries)


def read_entry(line: str) -> dict[str, Any] | None:
    """Return the entry in a line of `metrics.jsonl`, or `None` if the line is damaged."""
    try:
        entry = parse_json(line, METRICS_FILE)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and _is_complete(entry) else None


def _is_complete(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry holds what `Monitor` and `plot_evaluations` read of it. None is no finite number."""

    def are_numbers(values: Sequence[Any]) -> bool:
        return all(value is None or type(value) in (int, float) for value in values)

    if type(entry.get("step")) is not int:
        return False
    if "evaluation" not in entry:
        return isinstance(entry.get("loss"), list) and are_numbers(entry["loss"])
    rows = entry["evaluation"]
    kinds = [{*measure.keys} - {"shape"} for measure in MEASURES.values()]
    return isinstance(rows, dict) and all(
        isinstance(row, dict) and any(row.keys() >= kind for kind in kinds) and are_numbers([*row.values()])
        for row in rows.values()
    )


@contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Turn off the progress bars of transformers, and turn them on again only if they were on."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
