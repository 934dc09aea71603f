r"""Cut one subnet out of a supernet and bring it nearer to the BERT that the supernet was made of.

    python examples/polish_subnet.py --supernet outputs/family/last --shape 336 288 240 240 288 336 \
        --original sentence-transformers/all-MiniLM-L6-v2 --text corpus/*.txt.xz --output_dir outputs/polished
    accelerate launch --multi_gpu --num_processes 8 examples/polish_subnet.py --supernet ...

1. Extract (less than a second): the subnet computes what the supernet computes at this shape.
2. Refit (seconds): its bottlenecks are fitted to this one shape in closed form (`polish`).
3. Train (minutes): it learns the last hidden state of the original, without labels. A supernet shares its weights
   among all shapes; here one shape has them for itself.

The result is in the folder `last` of the output folder, with tokenizer and model card, and as a SentenceTransformer if
the supernet is one. Stop the script with Ctrl-C or SIGTERM: the same command continues where it was.
"""

import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import supershaper_hf
from supershaper_hf import (
    SearchSpace,
    SuperPretrainingArguments,
    SuperShaperConfig,
    calibration_batches,
    evaluate_shapes,
    fixed_masks,
    load_text,
    polish,
    read_sentence_encoder,
    save_for_hub,
    split_text,
    super_pretrain,
    text_table,
    tokenize,
)
from supershaper_hf.checks import check_count, load_pretrained
from supershaper_hf.processes import main_process_first, on_every_process, on_main_process
from supershaper_hf.training.arguments import HelpFormatter, option
from supershaper_hf.training.preparing import make_accelerator
from supershaper_hf.training.teacher import OutsideTeacher


# What the subnet learns from: unmasked text, and the last hidden states of the original.
RECIPE: dict[str, Any] = {
    "sampling": "fixed",
    "mlm_probability": 0.0,
    "state_weight": 1.0,
    "pooled_weight": 5.0,
    "no_dropout": True,
}
Batches = list[dict[str, torch.Tensor]]


@dataclass
class PolishingArguments:
    """The options of this script."""

    supernet: str = option("", "Folder or Hub id of the supernet, with its tokenizer.")
    original: str = option("", "Folder or Hub id of the BERT that the supernet was made of.")
    shape: list[int] | None = option(None, "The shape: one width for each layer; 0 drops the layer.")
    max_parameters: int | None = option(
        None,
        "Instead of --shape: the widest rectangle, one width for all layers, of at most so many parameters.",
    )
    text: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text without labels: files, globs or folders (.txt, .jsonl or .parquet; also .gz, .xz, .zst), or "
            "Hub ids of data sets."
        },
    )
    output_dir: str = option("", "Folder of the run. The subnet will be in its folder `last`.")
    max_steps: int = option(300, "Number of training steps. With 0 the subnet is refitted only.")
    calibration_tokens: int = option(20_000, "Number of tokens that the bottlenecks are fitted on, padding included.")
    validation_split_percentage: float = option(1.0, "Percentage of the documents that the subnet is measured on.")
    max_eval_samples: int = option(200, "Largest number of sequences that the subnet is measured on.")
    max_length: int = option(64, "Tokens of the longest sequence.")
    per_device_train_batch_size: int = option(32, "Sequences in a step of each process.")
    learning_rate: float = option(3e-4, "Highest learning rate of AdamW.")
    mixed_precision: str | None = option(
        None, "Precision: no, bf16 or fp16. By default the one that was given to `accelerate launch`."
    )
    save_steps: int = option(100, "Number of steps between two checkpoints.")
    seed: int = option(0, "Random seed of the order of the text.")

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "max_eval_samples"):
            check_count(name, getattr(self, name))
        check_count("max_steps", self.max_steps, 0)
        if (self.shape is None) == (self.max_parameters is None):
            raise ValueError("Give either --shape or --max_parameters.")
        self.training(None)  # refuses values that are out of range

    def training(self, pooling: str | None, output_dir: str | None = None) -> SuperPretrainingArguments:
        """Return the options of `super_pretrain`."""
        chosen = ("max_length", "per_device_train_batch_size", "learning_rate", "mixed_precision", "save_steps", "seed")
        options = RECIPE | {name: getattr(self, name) for name in chosen} | {"pooling": pooling or "mean"}
        return SuperPretrainingArguments(**options, max_steps=max(1, self.max_steps), output_dir=output_dir)


def parse_arguments(argv: list[str]) -> PolishingArguments:
    parser = HfArgumentParser((PolishingArguments,), description=__doc__, formatter_class=HelpFormatter)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.error(str(error))
    for name in ("supernet", "original", "text", "output_dir"):
        if not getattr(args, name):
            parser.error(f"--{name} is missing. See --help.")
    return args


def load_supernet(args: PolishingArguments) -> tuple[Any, list[int]]:
    """Return the supernet with the head that it was saved with, and the shape that was asked for.

    Raises:
        ValueError: If it is not a supernet, or the shape is not allowed.
    """
    config = load_pretrained("--supernet", args.supernet, AutoConfig.from_pretrained)
    if not isinstance(config, SuperShaperConfig) or config.merged_bottlenecks:
        raise ValueError(f"--supernet {args.supernet} is not a supernet. make_supernet.py makes one of a BERT.")
    name = (config.architectures or ["SuperShaperModel"])[0]
    supernet = getattr(supershaper_hf, name).from_pretrained(args.supernet)
    if args.shape is None:
        return supernet, SearchSpace.from_model(supernet).named_shape("rectangle", args.max_parameters)
    return supernet, config.normalize_shape(args.shape)


def load_data(args: PolishingArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Batches, Batches]:
    """Return sequences to train on, batches to refit on, and batches of other documents to measure on."""
    text, held_out = split_text(load_text(args.text), args.validation_split_percentage / 100, args.seed)
    train, evaluation = (tokenize(part, tokenizer, args.max_length) for part in (text, held_out))

    size = args.per_device_train_batch_size
    evaluation = evaluation.shuffle(seed=args.seed).select(range(min(len(evaluation), args.max_eval_samples)))
    refitted_on = calibration_batches(train, tokenizer, args.calibration_tokens, size, args.seed)
    return train, refitted_on, fixed_masks(evaluation, tokenizer, size, mlm_probability=0)


class Stages:
    """What the subnet is after each stage, and the seconds that the stage took."""

    def __init__(self, batches: Batches, original: PreTrainedModel, accelerator: Accelerator) -> None:
        self.batches, self.original, self.accelerator = batches, original, accelerator
        self.rows: list[dict[str, Any]] = []
        self.began = time.perf_counter()

    def measure(self, stage: str, subnet: Any) -> None:
        """Add a row to the table. Measuring itself does not count."""
        seconds = time.perf_counter() - self.began
        (record,) = evaluate_shapes(
            subnet, self.batches, [None], "Measuring", self.accelerator, measure="distance", original=self.original
        )
        figures = {name: record[name] for name in ("distance", "cosine")}
        self.rows.append({"subnet": stage, **figures, "seconds": round(seconds)})
        self.began = time.perf_counter()


def main() -> int:
    args = parse_arguments(sys.argv[1:])
    accelerator: Accelerator = make_accelerator(args.training(None))
    tokenizer = AutoTokenizer.from_pretrained(args.supernet)
    train, calibration, evaluation = main_process_first(partial(load_data, args, tokenizer), accelerator)
    card = on_main_process(partial(read_sentence_encoder, args.supernet), accelerator)
    if not Path(args.original).exists():
        card["base_model"] = args.original
    supernet, shape = on_every_process(partial(load_supernet, args), accelerator)
    supernet.to(accelerator.device)
    original = on_every_process(partial(AutoModel.from_pretrained, args.original), accelerator).to(accelerator.device)
    stages = Stages(evaluation, original, accelerator)
    subnet = supernet.extract_subnet(shape)
    stages.measure("extracted", subnet)
    on_every_process(partial(polish, subnet, supernet, shape, calibration, original), accelerator)
    stages.measure("refitted", subnet)
    del supernet
    if args.max_steps > 0:
        options, teacher = args.training(card.get("pooling"), args.output_dir), OutsideTeacher(original)
        summary = super_pretrain(subnet, tokenizer, train, options, teacher=teacher, card=card)
        if summary.status == "interrupted":
            accelerator.print("Start the same command again to continue.")
            return 0
        stages.measure("trained", subnet)
    else:
        save = partial(save_for_hub, subnet, Path(args.output_dir) / "last", tokenizer=tokenizer, **card)
        on_main_process(save, accelerator)
    accelerator.print(f"{shape}: {subnet.num_parameters():,} parameters\n{text_table(stages.rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
