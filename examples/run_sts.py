r"""Fine-tune a sentence encoder on pairs that people have rated, with the trainer of sentence-transformers.

    python examples/run_sts.py --model SUPERNET --shape 240 240 240 240 240 240 --train_file train.csv \
        --validation_file validation.csv --output_dir outputs/sts
    accelerate launch --num_processes 2 examples/run_sts.py --model SUBNET ...

The files (CSV, JSON lines or Parquet) have the columns of GLUE's STS-B: sentence1, sentence2, and label, a similarity
from 0 to --highest_label. The score is Spearman's correlation of the labels with the cosines of the embeddings.

`--model` may be a supernet, a subnet, or any other encoder that SentenceTransformer loads. The output folder gets
`results.json`, and in `model` the encoder, which SentenceTransformer loads. It needs the package sentence-transformers.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.losses import CosineSimilarityLoss
from transformers import HfArgumentParser

from supershaper_hf import extract_from_folder, text_table
from supershaper_hf.checks import check_count, check_number
from supershaper_hf.devices import copy_mapped_weights
from supershaper_hf.files import check_output_folder, write_json
from supershaper_hf.finetuning.glue import check_examples, read_file
from supershaper_hf.publish.results import SIMILARITY as RESULTS_FORMAT
from supershaper_hf.publish.results import library_versions
from supershaper_hf.training.arguments import HelpFormatter, option


@dataclass
class SimilarityArguments:
    """The options of this script."""

    model: str = option("", "Folder or Hub id of a sentence encoder; with --shape the folder of a supernet.")
    shape: list[int] | None = option(None, "Widths of the layers of the subnet that is cut out of the supernet.")
    train_file: str | None = option(None, "Pairs to train on. Without them, the encoder is only scored.")
    validation_file: str = option("", "Pairs to score.")
    output_dir: str = option("", "Folder of the results. It must not exist or be empty.")
    highest_label: float = option(5.0, "The label of two sentences that say the same.")
    num_train_epochs: float = option(2.0, "Number of times that every pair is trained on.")
    per_device_train_batch_size: int = option(32, "Pairs in a batch of each process.")
    learning_rate: float = option(5e-5, "Highest learning rate of AdamW.")
    seed: int = option(0, "Random seed of the order of the pairs and of dropout.")

    def __post_init__(self) -> None:
        for name in ("model", "validation_file", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing.")
        check_number("--highest_label", self.highest_label, above=0)
        check_number("--num_train_epochs", self.num_train_epochs, above=0)
        check_count("--per_device_train_batch_size", self.per_device_train_batch_size)


def parse_arguments(arguments: Sequence[str] | None) -> SimilarityArguments:
    parser = HfArgumentParser((SimilarityArguments,), description=__doc__, formatter_class=HelpFormatter)
    try:
        return parser.parse_args_into_dataclasses(arguments)[0]
    except ValueError as error:
        parser.error(str(error))


def read_pairs(args: SimilarityArguments, file: str, split: str) -> Dataset:
    """Return the pairs of a file with their similarity, `score`, from 0 to 1."""
    data = check_examples(read_file(file), "stsb", split, ("sentence1", "sentence2"), labels=())
    scores = [label / args.highest_label for label in data["label"]]
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError(f"{file} has a label that is not from 0 to --highest_label {args.highest_label:g}.")
    return data.remove_columns("label").add_column("score", scores)


def load_encoder(args: SimilarityArguments, training: SentenceTransformerTrainingArguments) -> SentenceTransformer:
    """Return the encoder in float32; with a shape, that of the subnet, which the main process cuts out first."""
    source = args.model
    if args.shape is not None:
        source = str(Path(args.output_dir) / "subnet")
        with training.main_process_first():
            if training.process_index == 0:
                extract_from_folder(args.model, args.shape, source)
    encoder = SentenceTransformer(source, device=str(training.device), model_kwargs={"dtype": torch.float32})
    copy_mapped_weights(encoder)
    return encoder


def train(
    args: SimilarityArguments, training: SentenceTransformerTrainingArguments, encoder: SentenceTransformer
) -> None:
    """Train the encoder in place: the cosine of two embeddings learns to be their similarity."""
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=training,
        train_dataset=read_pairs(args, str(args.train_file), "train"),
        loss=CosineSimilarityLoss(encoder),
    )
    trainer.train()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    training = SentenceTransformerTrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=args.per_device_train_batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        seed=args.seed,
        save_strategy="no",
        logging_strategy="epoch",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    with training.main_process_first():
        if training.process_index == 0:
            check_output_folder(args.output_dir)
        pairs = read_pairs(args, args.validation_file, "validation")
    encoder = load_encoder(args, training)
    evaluator = EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], pairs["score"])
    scores = {"before": evaluator(encoder)["spearman_cosine"]}
    if args.train_file is not None:
        train(args, training, encoder)
        scores["after"] = evaluator(encoder)["spearman_cosine"]
    if training.process_index == 0:
        parameters = sum(parameter.numel() for parameter in encoder.parameters())
        encoder.save_pretrained(str(Path(args.output_dir) / "model"))
        results = {"model": args.model, "shape": args.shape, "parameters": parameters, "pairs": len(pairs), **scores}
        results["library_version"] = library_versions()
        write_json(Path(args.output_dir) / "results.json", RESULTS_FORMAT, results)
        rows = [{"training": when, "STS": f"{score:.4f}"} for when, score in scores.items()]
        print(f"{parameters:,} parameters, {len(pairs)} pairs")
        print(text_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
