r"""Fine-tune a subnet, or any other encoder, on a task of GLUE or on your own files, with several seeds.

    python examples/run_glue.py --model SUPERNET --max_cost 12000000 --task sst2 --output_dir outputs/sst2
    python examples/run_glue.py --model SUBNET --task rte --train_file train.csv --validation_files validation.csv \
        --seeds 0 1 2 --output_dir outputs/rte
    accelerate launch --num_processes 2 examples/run_glue.py --model SUBNET --task mnli --output_dir outputs/mnli

With --sandwich the whole supernet is fine-tuned: afterwards every subnet is ready for the task. Shapes are measured on
it, and the best one for --max_cost is saved in the folder `subnet`.

Data comes from the Hub, or from CSV, JSON lines or Parquet files with GLUE's column names. `--task classification` and
`--task regression` take files with labels of your own. Every option of transformers.TrainingArguments works too.

The output folder gets `results.json` (scores of every seed, mean and spread) and `model`, the model of the best seed
with its card. The same command continues after an interruption.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from supershaper_hf.checks import check_choice
from supershaper_hf.finetuning.arguments import parse_options
from supershaper_hf.finetuning.experiment import fine_tune, results_text
from supershaper_hf.finetuning.glue import GLUE, TASKS, glue_task
from supershaper_hf.finetuning.models import load_tokenizer
from supershaper_hf.training.arguments import option


@dataclass
class GlueArguments:
    """Which task, and where its data is."""

    task: str = option("", f"The task: {', '.join(TASKS)}.")
    train_file: str | None = option(
        None, "Training examples: a .csv, .jsonl or .parquet file. By default from the Hub."
    )
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "Examples to score: one file, for mnli matched and mismatched ones."}
    )
    dataset_name: str = option(GLUE, "Hub id or folder of a data set with GLUE's configurations.")

    def __post_init__(self) -> None:
        check_choice("--task", self.task, TASKS)


def main(arguments: Sequence[str] | None = None) -> int:
    data, args = parse_options(GlueArguments, __doc__, arguments)
    tokenizer = load_tokenizer(args)
    with args.main_process_first():
        task = glue_task(
            data.task, tokenizer, data.train_file, data.validation_files, data.dataset_name, args.max_length
        )
    results = fine_tune(args, task, tokenizer)
    if args.process_index == 0:
        print(results_text(results, args.output_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
