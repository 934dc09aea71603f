r"""Fine-tune a subnet, or any other encoder, to answer questions with a span of a text: SQuAD, versions 1 and 2.

    python examples/run_qa.py --model SUPERNET --max_cost 12000000 --train_file train-v2.0.json \
        --validation_file dev-v2.0.json --max_length 384 --output_dir outputs/qa
    python examples/run_qa.py --model SUBNET --dataset_name rajpurkar/squad --max_length 384 --output_dir outputs/qa
    accelerate launch --num_processes 2 examples/run_qa.py --model SUBNET ...

A file is one of SQuAD as it is distributed, or has a row for each question with `id`, `question`, `context` and
`answers`. A context that is longer than --max_length is read in windows that share --stride tokens. If some questions
have no answer, the task is version 2. Scores are those of SQuAD's own scripts, in percent: exact match and F1, in
version 2 also of the questions with (HasAns) and without an answer (NoAns). Every option of
transformers.TrainingArguments works too.

With --sandwich the whole supernet is fine-tuned, see run_glue.py.

The output folder gets `results.json` (scores of every seed, mean and spread) and `model`, the model of the best seed
with its card. The same command continues after an interruption.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from supershaper_hf.finetuning.arguments import parse_options
from supershaper_hf.finetuning.experiment import fine_tune, results_text
from supershaper_hf.finetuning.models import load_tokenizer
from supershaper_hf.finetuning.questions import question_task
from supershaper_hf.training.arguments import option


@dataclass
class QuestionArguments:
    """Where the questions are, and how they are read and answered."""

    train_file: str | None = option(None, "Questions to train on: a .json, .jsonl or .parquet file.")
    validation_file: str | None = option(None, "Questions to score.")
    dataset_name: str | None = option(
        None, "Instead of files: Hub id or folder of a data set, or either with :CONFIGURATION."
    )
    stride: int | None = option(
        None, "Tokens that two neighbouring windows of a context share. By default a third of --max_length."
    )
    max_question_length: int | None = option(
        None, "Tokens after which a question is cut. By default 64, but at most a quarter of --max_length."
    )
    max_answer_length: int = option(30, "Tokens of the longest answer that is given.")
    null_score_diff_threshold: float = option(
        0.0,
        "In version 2, the answer is that there is none if the score of [CLS] exceeds that of the best span by more "
        "than this. The results have the best value on the validation questions as best_f1_thresh.",
    )
    task_name: str = option("qa", "What the card and the results call the task.")


def main(arguments: Sequence[str] | None = None) -> int:
    data, args = parse_options(QuestionArguments, __doc__, arguments)
    tokenizer = load_tokenizer(args)
    with args.main_process_first():
        task = question_task(
            tokenizer,
            data.train_file,
            data.validation_file,
            data.dataset_name,
            args.max_length,
            data.stride,
            data.max_question_length,
            data.max_answer_length,
            data.null_score_diff_threshold,
            data.task_name,
        )
    results = fine_tune(args, task, tokenizer)
    if args.process_index == 0:
        shown = ("exact_match", "exact", "f1", "HasAns_f1", "NoAns_f1", "best_f1", "best_f1_thresh")
        print(results_text(results, args.output_dir, shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
