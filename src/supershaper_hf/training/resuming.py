"""What a run resumes with: the numbers in a checkpoint, and the conditions that may or may not change.

The conditions of a run are everything that decides its result. A run that resumes compares them with those of the
checkpoint: some may differ without effect (`FREE`), some take effect from the next step on (`FROM_NEXT_STEP`), and a
difference in any other one is refused, because the result would be neither the old run nor a new one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data.sequences import fingerprint_tokenizer
from ..files import checksum, parse_json, read_json, to_json, write_json
from ..model.configuration_supershaper import SuperShaperConfig
from .arguments import SuperPretrainingArguments
from .progress import Progress


STATE_FILE = "progress.json"
STATE_FORMAT = "supershaper-hf training state 1"

FREE = (  # These do not change the result.
    "output_dir", "resume_from_checkpoint", "logging_steps", "save_steps", "save_total_limit", "report_to",
    "dataloader_num_workers", "max_skipped_steps",
)  # fmt: skip
FROM_NEXT_STEP = (  # Each step reads these anew, so a new value is really applied.
    "max_steps", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "max_grad_norm",
    "per_device_train_batch_size", "gradient_accumulation_steps", "processes", "mlm_probability",
    "random_shapes", "distribution", "drop_rate",
    "distillation_weight", "temperature", "divergence", "hidden_weight", "attention_weight", "teacher_weight",
    "relation_heads", "state_weight", "pooled_weight", "first_token_weight", "pooling", "no_dropout",
    "shared_learning_rate_scale", "teacher", "trained_parameters", "evaluation_text",
    "mixed_precision", "gradient_checkpointing", "torch_compile", "eval_steps", "target_perplexity",
)  # fmt: skip
MODEL_CONDITIONS = (
    "vocab_size", "hidden_size", "hidden_sizes", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "layer_norm_eps", "pad_token_id", "tie_word_embeddings", "width_choices", "head_slicing", "merged_bottlenecks",
    "bottlenecks", "full_head_scale",
)  # fmt: skip


def run_conditions(
    args: SuperPretrainingArguments,
    config: SuperShaperConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str,
    evaluation_text: str | None,
    teacher: str | None,
    trained_parameters: int,
    processes: int,
    mixed_precision: str,
) -> dict[str, Any]:
    """Return everything that decides the result of a run, as values that JSON knows.

    Args:
        args: Every argument counts but those in `FREE`.
        config: Configuration of the model.
        tokenizer: The tokenizer.
        text: `MicroBatches.fingerprint`.
        evaluation_text: `fingerprint_evaluation`.
        teacher: `OutsideTeacher.fingerprint`, or `None` without an outside teacher.
        trained_parameters: Number of parameters that are not frozen.
        processes: Number of processes.
        mixed_precision: The precision of the accelerator. That of `args` may be `None`, for what the launcher was told.
    """
    conditions = {name: value for name, value in vars(args).items() if name not in FREE}
    conditions |= {name: getattr(config, name) for name in MODEL_CONDITIONS}
    conditions |= {
        "text": text,
        "evaluation_text": evaluation_text,
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "teacher": teacher,
        "trained_parameters": trained_parameters,
        "processes": processes,
        "mixed_precision": mixed_precision,
    }
    return parse_json(to_json(conditions), "The conditions")  # tuples become lists, as in a file


def fingerprint_evaluation(batches: Sequence[Mapping[str, torch.Tensor]]) -> str | None:
    """Return a checksum of masked sequences, or `None` if there are none. Their batches and padding do not count."""
    if not batches:
        return None
    rows = []
    for batch in batches:
        masks = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool()
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], masks):
            rows.append((ids[mask].tolist(), labels[mask].tolist()))
    return checksum(sorted(rows))


def changed_conditions(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> list[dict[str, Any]]:
    """Compare the conditions of a checkpoint with those of this run.

    Returns:
        What changes with the next step: `name`, `before` and `after` of each.

    Raises:
        ValueError: If a condition differs that has to stay the same within a run.
    """
    changes = [
        {"name": name, "before": before.get(name), "after": now.get(name)}
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    fixed = [change for change in changes if change["name"] not in FROM_NEXT_STEP]
    # A stream is read in parts, one for each process. Stored text is shared out anew.
    if str(now["text"]).startswith("stream"):
        fixed += [change for change in changes if change["name"] == "processes"]
    # The losses of a run are of one kind: with labels masked-LM losses, without them distances to a teacher.
    if 0 in (before.get("mlm_probability"), now.get("mlm_probability")):
        fixed += [change for change in changes if change["name"] == "mlm_probability"]
    if fixed:
        raise ValueError(
            f"{checkpoint} was written by a run under other conditions, which cannot change within a run: "
            f"{describe_changes(fixed)}. Start again with the old values to resume, or choose another output_dir for a "
            "new run."
        )
    return changes


def describe_changes(changes: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{change['name']} was {change['before']!r}, is {change['after']!r}" for change in changes)


@dataclass
class TrainingState:
    """The numbers of a checkpoint. Its tensors are in `state.py`.

    Attributes:
        conditions: See `run_conditions`.
        progress: The counters of the run.
        positions: For each process, where it continues in the text.
        scaler: State of the gradient scaler of fp16; empty in other precisions.
    """

    conditions: dict[str, Any]
    progress: Progress
    positions: list[dict[str, Any] | None]
    scaler: dict[str, Any]


def write_state(folder: Path, state: TrainingState) -> None:
    """Write the numbers of a checkpoint into its folder."""
    write_json(folder / STATE_FILE, STATE_FORMAT, asdict(state))


def read_state(checkpoint: Path) -> TrainingState:
    """Read what `write_state` has written.

    Raises:
        ValueError: If the file is damaged, or of another version.
    """
    saved = read_json(checkpoint / STATE_FILE, STATE_FORMAT)
    try:
        return TrainingState(**saved | {"progress": Progress(**saved["progress"])})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} was written by another version of supershaper-hf ({error}). Go on with that version, or "
            "choose another output_dir."
        ) from error


def position_in_text(state: TrainingState, rank: int, sequences_per_micro_batch: int) -> dict[str, Any] | None:
    """Return where process `rank` continues in the text.

    Args:
        state: The state of the checkpoint.
        rank: Number of this process.
        sequences_per_micro_batch: Sequences that all processes together read in one micro-batch.
    """
    if state.positions[0] is not None and "micro_batch" in state.positions[0]:  # stored text
        return {"micro_batch": state.progress.sequences // sequences_per_micro_batch}
    return state.positions[rank]
