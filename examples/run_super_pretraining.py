r"""Train a supernet from a BERT, or go on training a supernet or a subnet, on any number of processes.

    accelerate launch examples/run_super_pretraining.py --bert google-bert/bert-base-cased \
        --train_files corpus/*.txt.xz --validation_files validation.txt --output_dir outputs/supernet
    accelerate launch examples/run_super_pretraining.py run.yaml --max_steps 2000   # options in a file, and changes

`--help` lists all options. Stop it with Ctrl-C or SIGTERM: it writes a checkpoint, and the same command goes on from
there. Its exit status is 0 also then, though launchers of several processes may report the signal; they kill processes
that take longer than half a minute to save, unless told otherwise. `outputs/supernet/last` exists only when the run is
complete.
"""

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
from supershaper_hf.convert.importance import reorder_channels
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.documents import load_text, split_text
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.model.costs import training_flops
from supershaper_hf.publish.hub import push_folder
from supershaper_hf.training.arguments import HelpFormatter, SuperPretrainingArguments, option
from supershaper_hf.training.checkpoints import list_checkpoints
from supershaper_hf.training.distillation import OutsideTeacher
from supershaper_hf.training.loop import make_accelerator, super_pretrain


@dataclass
class ScriptArguments:
    """Where model and text come from, and where the result goes."""

    bert: str | None = option(None, "A BERT checkpoint, folder or Hub id, to make a supernet of.")
    model: str | None = option(None, "A supernet or subnet to go on training, instead of --bert.")
    tokenizer: str | None = option(None, "By default the one beside the model.")
    width_choices: list[int] | None = option(None, "Hidden sizes a layer can take; by default seven.")
    head_slicing: str = option("prefix", "prefix (the paper's) or per_head: how attention heads are narrowed.")
    train_files: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, globs, folders (.txt .jsonl .parquet, .gz .xz .zst) or Hub ids."},
    )
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "By default held_out of the training text; nothing when streaming."}
    )
    text_column: str = option("text", "Column of the text in JSON lines and Parquet.")
    held_out: float = option(0.01, "Share of the documents to evaluate on where there are no validation files.")
    max_eval_sequences: int = option(1000, "Sequences evaluated at most.")
    streaming: bool = option(False, "Read the text while training instead of tokenising all of it first.")
    tokenize_processes: int | None = option(None, "Processes that tokenise.")
    teacher: str | None = option(None, "An outside teacher with the same tokenizer, for --teacher_weight.")
    teacher_layer: int = option(-1, "The teacher's layer to learn from.")
    head_steps: int = option(0, "Steps that train only the masked-LM head first, for checkpoints without one.")
    reorder: bool = option(False, "Order channels by importance before training, so that narrow shapes start better.")
    match_compute: str | None = option(None, "training_summary.json of another run: train for as many FLOPs.")
    push_to_hub: str | None = option(None, "user/name to publish the last model to.")


def parse_arguments(argv: list[str]) -> tuple[ScriptArguments, SuperPretrainingArguments]:
    """Read flags, or a YAML file of the same names followed by flags that change it."""
    parser = HfArgumentParser(
        (ScriptArguments, SuperPretrainingArguments), description=__doc__, formatter_class=HelpFormatter
    )
    if argv and argv[0].endswith((".yaml", ".yml")):
        options = yaml.safe_load(Path(argv[0]).read_text()) or {}
        known = {f.name for cls in (ScriptArguments, SuperPretrainingArguments) for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            parser.error(f"{argv[0]}: unknown option(s) {', '.join(unknown)}. Allowed: {', '.join(sorted(known))}.")
        parser.set_defaults(**options)
        argv = argv[1:]
    script, args = parser.parse_args_into_dataclasses(argv)
    if (script.bert is None) == (script.model is None):
        parser.error("Give exactly one of --bert and --model.")
    if not script.train_files:
        parser.error("--train_files is missing: text files, globs, folders or Hub ids.")
    if script.reorder and script.streaming:
        parser.error("--reorder measures importance on stored text: leave out --streaming, or order the model before.")
    if args.output_dir is None:
        parser.error("--output_dir is missing: the folder for checkpoints and models.")
    return script, args


def load_model(script: ScriptArguments, args: SuperPretrainingArguments) -> SuperShaperForMaskedLM:
    if script.bert:
        return SuperShaperForMaskedLM.from_bert(
            script.bert, width_choices=script.width_choices, head_slicing=script.head_slicing
        )
    config = AutoConfig.from_pretrained(script.model)
    if not isinstance(config, SuperShaperConfig):
        raise ValueError(
            f"--model {script.model} is a {config.model_type} model. For a BERT, use --bert {script.model}."
        )
    if config.merged_bottlenecks and args.sampling != "fixed":
        raise ValueError(f"--model {script.model} is a subnet, which has one shape only: add --sampling fixed.")
    return SuperShaperForMaskedLM.from_pretrained(script.model, config=config)


def load_data(
    script: ScriptArguments,
    args: SuperPretrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> tuple[Dataset | IterableDataset, list[dict[str, torch.Tensor]]]:
    """Return what to train on, and masked batches to evaluate on, the same for every process and run."""

    def sequences(text: Dataset) -> Dataset:
        return tokenize(text, tokenizer, args.max_length, args.cross_documents, num_proc=script.tokenize_processes)

    with accelerator.main_process_first():  # the others find its results in the cache
        train = load_text(script.train_files, script.text_column, streaming=script.streaming)
        if script.validation_files:
            held_out = load_text(script.validation_files, script.text_column)
        elif script.streaming:
            return train, []
        else:
            train, held_out = split_text(train, script.held_out, args.seed)
        evaluation = sequences(held_out)
        evaluation = evaluation.select(range(min(len(evaluation), script.max_eval_sequences)))
        batches = fixed_masks(evaluation, tokenizer, args.per_device_train_batch_size, args.mlm_probability, args.seed)
        return train if script.streaming else sequences(train), batches


def match_compute(summary_file: str, config: SuperShaperConfig, args: SuperPretrainingArguments, processes: int) -> int:
    """Return the number of steps at which training `args.shape` costs as many FLOPs as the summarised run.

    The text is taken to be alike: as long and as densely labelled as the other run's sequences were on average.
    """
    summary = json.loads(Path(summary_file).read_text())
    length = round(summary["padded_tokens"] / summary["sequences"])
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    labelled = round(sequences * summary["labelled"] / summary["sequences"])
    shape = args.shape or config.hidden_sizes
    return round(summary["flops"] / training_flops(config, [shape], sequences, length, labelled))


def prepare(
    model: SuperShaperForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    script: ScriptArguments,
    args: SuperPretrainingArguments,
) -> None:
    """Train a missing head and order the channels, if asked to."""
    if script.head_steps:
        model.bert.requires_grad_(False)
        head = SuperPretrainingArguments(
            max_steps=script.head_steps,
            per_device_train_batch_size=args.per_device_train_batch_size,
            learning_rate=1e-3,
            sampling="fixed",
            mlm_probability=args.mlm_probability,
            max_length=args.max_length,
            mixed_precision=args.mixed_precision,
            seed=args.seed,
        )
        super_pretrain(model, tokenizer, dataset, head, description="Head only")
        model.bert.requires_grad_(True)
    if script.reorder:
        sample = dataset.select(range(min(len(dataset), 256)))
        reorder_channels(
            model, fixed_masks(sample, tokenizer, args.per_device_train_batch_size, args.mlm_probability, args.seed)
        )


def main() -> int:
    script, args = parse_arguments(sys.argv[1:])
    accelerator = make_accelerator(args)
    model = load_model(script, args)
    tokenizer = AutoTokenizer.from_pretrained(script.tokenizer or script.bert or script.model)
    dataset, eval_batches = load_data(script, args, tokenizer, accelerator)
    if script.match_compute:
        args.max_steps = match_compute(script.match_compute, model.config, args, accelerator.num_processes)
    if not list_checkpoints(args.output_dir):
        prepare(model, tokenizer, dataset, script, args)
    teacher = (
        OutsideTeacher(AutoModel.from_pretrained(script.teacher), script.teacher_layer) if script.teacher else None
    )
    card = {"repo_id": script.push_to_hub} if script.push_to_hub else {}
    if script.bert and not Path(script.bert).exists():
        card["base_model"] = script.bert
    summary = super_pretrain(
        model,
        tokenizer,
        dataset,
        args,
        eval_batches=eval_batches,
        teacher=teacher,
        card=card,
    )
    if not accelerator.is_main_process:
        return 0
    print(f"{summary.status} after step {summary.progress.step:,}: {args.output_dir}")
    if summary.status == "interrupted":
        print("Start the same command again to go on.")
    elif script.push_to_hub:
        print(push_folder(Path(args.output_dir) / "last", script.push_to_hub))
    return 0


if __name__ == "__main__":
    sys.exit(main())
