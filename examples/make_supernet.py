r"""Make a supernet of any BERT, with or without a masked-LM head, from a few hours of one machine and unlabelled text.

    python examples/make_supernet.py --bert sentence-transformers/all-MiniLM-L6-v2 --text corpus/*.txt.xz \
        --output_dir outputs/family --hours 3
    accelerate launch --multi_gpu --num_processes 8 examples/make_supernet.py --bert ...

1. Calibrate (minutes): narrow layers start from what they can keep of the BERT, in closed form (`calibrate`).
2. Train for the hours given: every shape learns the last hidden state of the BERT itself, which needs neither labels
   nor a vocabulary (`RECIPE` below).
3. Measure how far subnets of every width are from the BERT, and draw it.

The supernet is in the folder `last` of the output folder: `from_pretrained` loads it, `extract_subnet(shape)` cuts a
small model out of it. Stop the script with Ctrl-C or SIGTERM: the same command continues where it was.
"""

import copy
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from supershaper_hf import (
    SearchSpace,
    SuperPretrainingArguments,
    SuperShaperForMaskedLM,
    SuperShaperModel,
    calibrate,
    calibration_batches,
    evaluate_shapes,
    fixed_masks,
    load_text,
    read_sentence_encoder,
    save_for_hub,
    split_text,
    super_pretrain,
    text_table,
    tokenize,
)
from supershaper_hf.checks import check_count, check_number, load_pretrained
from supershaper_hf.files import read_json, write_json
from supershaper_hf.processes import main_process_first, on_every_process, on_main_process
from supershaper_hf.report.plots import plot_measured
from supershaper_hf.training.arguments import HelpFormatter, option
from supershaper_hf.training.preparing import make_accelerator
from supershaper_hf.training.teacher import OutsideTeacher


# What every shape learns from, and which shapes learn in a step. docs/decisions.md says what was tried.
RECIPE: dict[str, Any] = {
    "mlm_probability": 0.0,  # unmasked text, no labels
    "state_weight": 1.0,
    "pooled_weight": 1.0,
    "sampling": "random",
    "random_shapes": 3,
    "distribution": "budget",
    "no_dropout": True,
    "learning_rate": 5e-4,
    "shared_learning_rate_scale": 0.6,
    "group_by_length": True,
}
PLAN_FILE, PLAN_FORMAT = "plan.json", "supershaper-hf plan 1"
TIMED_STEPS = 6  # the first of them is not counted


@dataclass
class SupernetArguments:
    """The options of this script."""

    bert: str = option("", "Folder or Hub id of a BERT, with or without a masked-LM head.")
    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Text without labels: files, globs or folders (.txt, .jsonl or .parquet; also .gz, .xz, "
                          ".zst), or Hub ids of data sets."},
    )  # fmt: skip
    output_dir: str = option("", "Folder of the run. The supernet will be in its folder `last`.")
    hours: float = option(3.0, "Hours of training on this machine, after calibration. With 0 it is only calibrated.")
    max_steps: int | None = option(None, "Number of training steps, instead of --hours.")
    validation_text: list[str] = field(
        default_factory=list, metadata={"help": "Text to measure on. By default 1 % of the documents of --text."}
    )
    max_eval_samples: int = option(200, "Largest number of sequences that shapes are measured on.")
    calibration_tokens: int = option(50_000, "Number of tokens that the supernet is calibrated on.")
    width_choices: list[int] | None = option(None, "Widths that a layer can have. By default seven up to the BERT's.")
    pooling: str | None = option(
        None, "Pooling of a sentence encoder, mean or cls, which is saved and taught. By default what --bert says."
    )
    max_length: int = option(128, "Tokens of the longest sequence in training.")
    per_device_train_batch_size: int = option(64, "Sequences in a step of each process.")
    learning_rate: float = option(RECIPE["learning_rate"], "Highest learning rate of AdamW.")
    shared_learning_rate_scale: float = option(
        RECIPE["shared_learning_rate_scale"],
        "Factor of the learning rate of weights that all widths share. With 0 the largest shape stays the BERT itself.",
    )
    first_token_weight: float = option(
        0.0, "Weight of the state of [CLS], which classifiers read, once more. Its effect was not measured yet."
    )
    mixed_precision: str | None = option(
        None, "Precision: no, bf16 or fp16. By default the one that was given to `accelerate launch`."
    )
    save_steps: int = option(500, "Number of steps between two checkpoints.")
    seed: int = option(0, "Random seed of the text's order and of the shapes.")

    def __post_init__(self) -> None:
        check_number("hours", self.hours, least=0)
        check_count("calibration_tokens", self.calibration_tokens)
        check_count("max_eval_samples", self.max_eval_samples)
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps)
        self.training(1)  # refuses values that are out of range

    def training(self, max_steps: int, output_dir: str | None = None) -> SuperPretrainingArguments:
        """Return the options of `super_pretrain`."""
        chosen = ("max_length", "per_device_train_batch_size", "learning_rate", "shared_learning_rate_scale")
        chosen += ("first_token_weight", "mixed_precision", "pooling", "save_steps", "seed")
        options = RECIPE | {name: getattr(self, name) for name in chosen}
        options |= {"max_steps": max_steps, "eval_steps": max(1, math.ceil(max_steps / 10)), "output_dir": output_dir}
        return SuperPretrainingArguments(**options)


def parse_arguments(argv: list[str]) -> SupernetArguments:
    parser = HfArgumentParser((SupernetArguments,), description=__doc__, formatter_class=HelpFormatter)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    for name in ("bert", "text", "output_dir"):
        if not getattr(args, name):
            parser.error(f"--{name} is missing. See --help.")
    return args


# Text and models


def load_data(args: SupernetArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Return sequences to train on, and sequences to measure on."""
    train = load_text(args.text)
    if args.validation_text:
        held_out = load_text(args.validation_text)
    else:
        train, held_out = split_text(train, 0.01, args.seed)
    evaluation = tokenize(held_out, tokenizer, args.max_length)
    evaluation = evaluation.shuffle(seed=args.seed).select(range(min(len(evaluation), args.max_eval_samples)))
    return tokenize(train, tokenizer, args.max_length), evaluation


def fastest_attention(accelerator: Accelerator) -> str:
    """Return the implementation of attention to train with.

    On CPUs, torch's fused attention is slow in bfloat16: its backward pass took 40 % of a step, and without it a step
    was 1.7 times as fast.
    """
    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return "eager" if slow else "sdpa"


def make_start(
    args: SupernetArguments,
    tokenizer: PreTrainedTokenizerBase,
    text: Dataset,
    card: Mapping[str, Any],
    attention: str,
) -> Any:
    """Return the calibrated supernet. It is saved in the folder `start`, and read from there the next time."""
    architectures = load_pretrained("--bert", args.bert, AutoConfig.from_pretrained).architectures or []
    has_head = any(name.endswith(("MaskedLM", "PreTraining")) for name in architectures)
    model_class = SuperShaperForMaskedLM if has_head else SuperShaperModel
    folder = Path(args.output_dir) / "start"
    if not folder.exists():
        batches = calibration_batches(text, tokenizer, args.calibration_tokens, args.per_device_train_batch_size)
        began = time.perf_counter()
        supernet = model_class.from_bert(
            args.bert, width_choices=args.width_choices, head_slicing="per_head", bottlenecks="by_width"
        )
        calibrate(supernet, batches, progress=True)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        print(f"Calibrated on {tokens:,} tokens in {time.perf_counter() - began:.0f} seconds: {folder}")
        save_for_hub(supernet, folder, tokenizer=tokenizer, **card)
    return model_class.from_pretrained(folder, attn_implementation=attention)


# Training


def plan_steps(
    args: SupernetArguments,
    accelerator: Accelerator,
    supernet: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: Dataset,
    teacher: OutsideTeacher,
) -> int:
    """Return the number of steps, the same on every process.

    A few steps of a copy are timed, and the plan is kept for the next start.
    """
    file = Path(args.output_dir) / PLAN_FILE
    if args.max_steps is not None:
        return args.max_steps

    def read_plan() -> int | None:
        return int(read_json(file, PLAN_FORMAT)["max_steps"]) if file.exists() else None

    steps = on_main_process(read_plan, accelerator)
    if steps is not None:
        return steps
    options = args.training(TIMED_STEPS)
    options.logging_steps = 1
    summary = super_pretrain(copy.deepcopy(supernet), tokenizer, text, options, teacher=teacher, description="Timing")

    def write_plan() -> int:
        speeds = [entry["tokens_per_second"] for entry in summary.log_history][1:]
        seconds = summary.progress.tokens / TIMED_STEPS / (sum(speeds) / len(speeds))
        steps = max(1, round(args.hours * 3600 / seconds))
        print(f"A step takes {seconds:.2f} seconds, so {args.hours:g} hours are {steps:,} steps.")
        write_json(file, PLAN_FORMAT, {"max_steps": steps, "hours": args.hours})
        return steps

    return on_main_process(write_plan, accelerator)


# Measuring


def measure(
    args: SupernetArguments, supernet: Any, bert: Any, evaluation: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print and draw how far rectangles of every width, and 20 random shapes, are from the BERT."""
    space = SearchSpace.from_model(supernet)
    rectangles = [[width] * space.num_layers for width in reversed(space.width_choices)]
    shapes = rectangles + space.sample(20, seed=args.seed).tolist()
    batches = fixed_masks(evaluation, tokenizer, args.per_device_train_batch_size, mlm_probability=0)
    folder = Path(args.output_dir)
    records = evaluate_shapes(
        supernet, batches, shapes, measure="distance", original=bert, records_file=folder / "records.jsonl"
    )
    parameters = space.num_parameters(shapes).tolist()
    rows: list[dict[str, Any]] = [
        {"shape": f"every layer {shape[0]}", "parameters": count} for shape, count in zip(rectangles, parameters)
    ]
    rows.append({"shape": "mean of 20 random", "parameters": round(sum(parameters[-20:]) / 20)})
    for key in ("distance", "cosine"):
        values = [record[key] for record in records]
        for row, value in zip(rows, [*values[: len(rectangles)], sum(values[-20:]) / 20]):
            row[key] = value
    print(text_table(rows))
    points = list(zip(parameters, (record["distance"] for record in records)))
    plot_measured(folder / "quality.png", rectangles=points[:-20], random=points[-20:])


def main() -> int:
    args = parse_arguments(sys.argv[1:])
    accelerator: Accelerator = make_accelerator(args.training(1))
    tokenizer = load_pretrained("--bert", args.bert, AutoTokenizer.from_pretrained)
    text, evaluation = main_process_first(partial(load_data, args, tokenizer), accelerator)
    card = on_main_process(partial(read_sentence_encoder, args.bert), accelerator)
    if not Path(args.bert).exists():
        card["base_model"] = args.bert
    attention = fastest_attention(accelerator)
    supernet = main_process_first(partial(make_start, args, tokenizer, text, card, attention), accelerator)
    load_bert = partial(AutoModel.from_pretrained, args.bert, attn_implementation=attention)
    bert = on_every_process(load_bert, accelerator)
    if args.hours > 0 or args.max_steps is not None:
        teacher = OutsideTeacher(bert)
        steps = plan_steps(args, accelerator, supernet, tokenizer, text, teacher)
        options = args.training(steps, args.output_dir)
        batches = fixed_masks(evaluation, tokenizer, args.per_device_train_batch_size, mlm_probability=0)
        summary = super_pretrain(supernet, tokenizer, text, options, eval_batches=batches, teacher=teacher, card=card)
        if summary.status == "interrupted":
            accelerator.print("Start the same command again to continue.")
            return 0
    if accelerator.is_main_process:
        measure(args, supernet, bert, evaluation, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
