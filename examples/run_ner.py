r"""Fine-tune a subnet, or any other encoder, to find named entities: CoNLL files, JSON lines, Parquet, or the Hub.

    python examples/run_ner.py --model SUPERNET --shape 336 288 240 240 288 336 --train_file train.conll \
        --validation_file valid.conll --test_file test.conll --output_dir outputs/ner
    python examples/run_ner.py --model SUBNET --dataset_name user/name --seeds 0 1 2 --output_dir outputs/ner
    accelerate launch --num_processes 2 examples/run_ner.py --model SUBNET ...

A CoNLL file has one word a line, its label in the last column, and an empty line after each sentence. Labels are O, and
B-, I-, E- or S- with a type. Scores are precision, recall and F1 of whole entities, as seqeval and conlleval define
them, and F1 of each type. Every option of transformers.TrainingArguments works too.

With --sandwich the whole supernet is fine-tuned, see run_glue.py.

The output folder gets `results.json` (scores of every seed, mean and spread) and `model`, the model of the best seed
with its card. The same command continues after an interruption.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from supershaper_hf.finetuning.arguments import parse_options
from supershaper_hf.finetuning.entities import entity_task
from supershaper_hf.finetuning.experiment import fine_tune, results_text
from supershaper_hf.finetuning.models import load_tokenizer
from supershaper_hf.training.arguments import option


@dataclass
class EntityArguments:
    """Where the sentences are."""

    train_file: str | None = option(
        None, "Sentences to train on: a .jsonl, .json or .parquet file, or CoNLL columns in a file with another suffix."
    )
    validation_file: str | None = option(None, "Sentences that choose the best epoch.")
    test_file: str | None = option(None, "Further sentences to score.")
    dataset_name: str | None = option(
        None, "Instead of files: Hub id or folder of a data set, or either with :CONFIGURATION."
    )
    token_column: int = option(0, "The column of the word in CoNLL files, from 0; -1 is the last one.")
    label_column: int = option(-1, "The column of the label in CoNLL files.")
    task_name: str = option("ner", "What the card and the results call the task.")


def main(arguments: Sequence[str] | None = None) -> int:
    data, args = parse_options(EntityArguments, __doc__, arguments)
    tokenizer = load_tokenizer(args)
    with args.main_process_first():
        task = entity_task(
            tokenizer,
            data.train_file,
            data.validation_file,
            data.test_file,
            data.dataset_name,
            args.max_length,
            data.token_column,
            data.label_column,
            data.task_name,
        )
    results = fine_tune(args, task, tokenizer)
    if args.process_index == 0:
        print(results_text(results, args.output_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
