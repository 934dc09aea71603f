"""The options of a fine-tuning: those of `TrainingArguments`, which model, which shape, which seeds, which teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import HfArgumentParser, TrainingArguments

from ..checks import check_choice, check_count, check_number
from ..training.arguments import HelpFormatter, option


Options = TypeVar("Options")

COSTS = ("parameters", "flops")


@dataclass
class FineTuningArguments(TrainingArguments):
    """The options of `fine_tune`. They are checked at construction.

    Every option of `transformers.TrainingArguments` can be given too. Of these, some have other default values: after
    each epoch the model is scored and saved, the best epoch is kept, and nothing is reported to a tracker.

    Raises:
        ValueError: If a value is out of its range, or two options do not go together.

    Example:
        >>> args = FineTuningArguments(output_dir="outputs/sst2", model="supernet", max_cost=12e6, use_cpu=True)
        >>> args.num_train_epochs, args.seeds
        (3.0, [0])
    """

    # What is fine-tuned
    model: str = option(
        "", "Folder or Hub id of a supernet, a subnet, or any other encoder that the Auto classes of transformers load."
    )
    tokenizer_name: str | None = option(None, "Folder or Hub id of the tokenizer. By default the one of the model.")
    shape: list[int] | None = option(None, "Widths of the layers of the subnet that is cut out of a supernet.")
    max_cost: float | None = option(
        None,
        "Budget of the subnet with the task's head, in the unit of --cost. By the records in --records_file, or in "
        "the folder search/ of the model, its shape is the one with the lowest predicted loss. Without records, shapes "
        "are measured on examples of the task, and the one nearest to the largest shape is taken.",
    )
    cost: str = option("parameters", f"What --max_cost counts: {' or '.join(COSTS)} (of --max_length tokens).")
    records_file: str | None = option(None, "The records.jsonl of measured shapes of the supernet.")
    num_shapes: int = option(40, "Number of shapes to measure if there are no records, and with --sandwich.")

    # How
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Random seeds. Each is one run; scores are mean and spread."}
    )
    early_stopping_patience: int | None = option(None, "Number of epochs without a better score before a run stops.")
    teacher: str | None = option(
        None, "Folder or Hub id of a model of any kind that is fine-tuned on this task and has the same tokenizer."
    )
    distillation_weight: float = option(0.5, "Share of the loss that is the distance to the teacher's logits.")
    state_weight: float = option(
        0.0,
        "Weight of the loss that matches the teacher's last hidden states, which are as wide as the model's. The model "
        "then starts with the teacher's head.",
    )
    sandwich: bool = option(
        False,
        "Whether the whole supernet is fine-tuned: each step trains the largest shape, the smallest one and random "
        "ones, which learn from the logits of the teacher, or else of the largest shape. Then shapes are measured.",
    )
    random_shapes: int = option(2, "Number of random shapes in each step with --sandwich.")
    temperature: float = option(1.0, "Temperature of both distributions that are compared with the teacher's.")
    trust_remote_code: bool = option(False, "Whether code in the repositories of --model and --teacher may run.")
    max_length: int = option(128, "Tokens of the longest example.")

    # Other default values than those of TrainingArguments
    learning_rate: float = option(5e-5, "Highest learning rate of AdamW.")
    per_device_train_batch_size: int = option(32, "Examples in a batch of each process.")
    per_device_eval_batch_size: int = option(64, "Examples in a batch of each process, for scoring.")
    warmup_steps: float = option(0.06, "Steps in which the learning rate rises; below 1 a share of all steps.")
    weight_decay: float = option(0.01, "Weight decay of the matrices.")
    eval_strategy: str = option("epoch", "When the model is scored: epoch or steps.")
    save_strategy: str = option("epoch", "When a checkpoint is written, from which a run resumes: epoch or steps.")
    save_total_limit: int | None = option(1, "Number of checkpoints that stay, besides the best one.")
    load_best_model_at_end: bool = option(True, "Whether the best epoch is kept, instead of the last one.")
    logging_strategy: str = option("epoch", "When the loss is logged: epoch or steps.")
    # HfArgumentParser reads a union of three only in this order.
    report_to: None | str | list[str] = option("none", "Trackers, such as tensorboard.")  # noqa: RUF036

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape is not None and self.max_cost is not None:
            raise ValueError("Give shape or max_cost, not both.")
        if self.max_cost is not None:
            check_number("max_cost", self.max_cost, above=0)
        check_choice("cost", self.cost, COSTS)
        if self.sandwich and self.shape is not None:
            raise ValueError("sandwich fine-tunes every shape. Leave shape out, or sandwich.")
        check_count("random_shapes", self.random_shapes, least=0)
        check_count("num_shapes", self.num_shapes)
        check_count("max_length", self.max_length)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds!r} must be one or more different numbers.")
        for seed in self.seeds:
            check_count("seeds", seed, least=0)
        if self.early_stopping_patience is not None:
            check_count("early_stopping_patience", self.early_stopping_patience)
        check_number("distillation_weight", self.distillation_weight, least=0, most=1)
        check_number("state_weight", self.state_weight, least=0)
        if self.state_weight > 0 and self.teacher is None:
            raise ValueError(f"state_weight={self.state_weight} needs a teacher. Name one, or set it to 0.")
        check_number("temperature", self.temperature, above=0)


def parse_options(
    options_class: type[Options], description: str | None, arguments: Sequence[str] | None
) -> tuple[Options, FineTuningArguments]:
    """Return the options of a script, from the command line or a list: its own ones, and those of the fine-tuning.

    A wrong option ends the script with one line that says what is wrong.
    """
    classes: Any = (options_class, FineTuningArguments)
    usage = "%(prog)s --model MODEL --output_dir FOLDER [options]    (--help shows all of them)"
    parser = HfArgumentParser(classes, description=description, usage=usage, formatter_class=HelpFormatter)
    try:
        options, args = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        parser.error(str(error))
    if not args.model or args.output_dir is None:
        parser.error("--model or --output_dir is missing.")
    return options, args
