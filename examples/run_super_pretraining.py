r"""Train a supernet from a BERT, or continue to train a supernet or a subnet, on any number of processes.

    accelerate launch examples/run_super_pretraining.py --model_name_or_path google-bert/bert-base-cased \
        --train_files corpus/*.txt.xz --validation_files validation.txt --output_dir outputs/supernet
    accelerate launch examples/run_super_pretraining.py examples/run.yaml --max_steps 2000

In the second form the options are in a file, and the options after it change them. `--help` lists all options.

The supernet learns to predict masked tokens. Without labels, it learns to compute what its BERT computes; then the BERT
needs no masked-LM head:

    accelerate launch examples/run_super_pretraining.py --model_name_or_path BERT --teacher BERT --state_weight 1 \
        --mlm_probability 0 --sampling smallest --no_dropout --train_files corpus/*.txt.xz --output_dir outputs/supernet

Stop the script with Ctrl-C or SIGTERM: it writes a checkpoint, and the same command continues from there. The exit
status is then 0 as well, but a launcher of several processes may report the signal. Launchers kill processes that take
longer than half a minute to save, unless an option gives them more time. The folder `last` in the output folder exists
only when the run is complete.
"""

import sys
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from supershaper_hf import (
    SuperPretrainingArguments,
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    SuperShaperModel,
    calibrate,
    calibration_batches,
    fixed_masks,
    load_text,
    push_folder,
    read_sentence_encoder,
    split_text,
    super_pretrain,
    tokenize,
)
from supershaper_hf.checks import check_choice, check_count, check_number, load_pretrained
from supershaper_hf.data.sequences import check_vocabulary
from supershaper_hf.devices import copy_mapped_weights
from supershaper_hf.files import parse_json
from supershaper_hf.model.costs import training_flops
from supershaper_hf.model.modeling_supershaper import SuperShaperPreTrainedModel
from supershaper_hf.processes import main_process_first, on_every_process, on_main_process
from supershaper_hf.training.arguments import HelpFormatter, option
from supershaper_hf.training.checkpoints import list_checkpoints
from supershaper_hf.training.distillation import TEACHER_WEIGHTS
from supershaper_hf.training.preparing import make_accelerator
from supershaper_hf.training.teacher import OutsideTeacher


HEADS = ("ForMaskedLM", "ForPreTraining")  # ends of the names of classes that have a masked-LM head
Batches = list[dict[str, torch.Tensor]]


@dataclass
class ScriptArguments:
    """Options that say where the model and the text come from, and where the result goes."""

    model_name_or_path: str | None = option(
        None, "Folder or Hub id of a BERT to make a supernet of, or of a supernet or subnet to continue to train."
    )
    tokenizer_name: str | None = option(None, "Folder or Hub id of the tokenizer. By default the one of the model.")
    width_choices: list[int] | None = option(
        None, "Widths that a layer of the new supernet can have. By default seven widths up to the BERT's."
    )
    head_slicing: str | None = option(
        None,
        "Which channels a narrow layer of the new supernet keeps: prefix (the first ones, as in the paper; the "
        "default) or per_head (the first ones of each attention head; the default with --calibration_tokens).",
    )
    bottlenecks: str | None = option(
        None,
        "What the widths of a layer of the new supernet share: shared (one output bottleneck, as in the paper; the "
        "default) or by_width (each narrow width has an output bottleneck of its own, and codes that stand for all "
        "channels by the few that it has).",
    )
    calibration_tokens: int = option(
        0,
        "Number of tokens of the training text on which the new supernet is calibrated before training, so that narrow "
        "shapes start close to the BERT. 20000 to 200000 are useful; 0 is the start of the paper.",
    )
    train_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Training text: files, globs or folders (.txt, .jsonl or .parquet; also .gz, .xz, .zst), or Hub "
            "ids of data sets."
        },
    )
    validation_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Validation text, given like the training text. By default a part of the training text, or no "
            "validation with --streaming."
        },
    )
    text_column: str = option("text", "Column that holds the text in JSON lines, Parquet files and Hub data sets.")
    validation_split_percentage: float = option(
        1.0, "Percentage of the training documents that become validation text if there are no --validation_files."
    )
    max_eval_samples: int = option(1000, "Largest number of sequences in an evaluation.")
    streaming: bool = option(
        False, "Whether to read and tokenize the text while training, instead of storing all of it first."
    )
    preprocessing_num_workers: int | None = option(None, "Number of processes that tokenize stored text.")
    teacher: str | None = option(
        None,
        "Folder or Hub id of an outside teacher that has the same tokenizer. It needs --teacher_weight, --state_weight "
        "or --pooled_weight. It may be the BERT that the supernet is made of.",
    )
    teacher_layer: int = option(-1, "Layer of the outside teacher to learn from. Negative numbers count from the end.")
    head_steps: int = option(
        0, "Number of steps that first train the masked-LM head alone. Use it for a BERT that has no such head."
    )
    match_compute: str | None = option(
        None, "File training_summary.json of another run. Its FLOPs then decide the number of steps, not --max_steps."
    )
    push_to_hub: str | None = option(None, "Repository, user/name, that the last model is published to.")

    def __post_init__(self) -> None:
        if self.head_slicing is not None:
            check_choice("head_slicing", self.head_slicing, ("prefix", "per_head"))
        if self.bottlenecks is not None:
            check_choice("bottlenecks", self.bottlenecks, ("shared", "by_width"))
        check_count("calibration_tokens", self.calibration_tokens, 0)
        check_number("validation_split_percentage", self.validation_split_percentage, above=0, below=100)
        check_count("max_eval_samples", self.max_eval_samples)
        if self.preprocessing_num_workers is not None:
            check_count("preprocessing_num_workers", self.preprocessing_num_workers)
        check_count("head_steps", self.head_steps, 0)


# Options


def parse_arguments(argv: list[str]) -> tuple[ScriptArguments, SuperPretrainingArguments]:
    """Read the options: flags, or a YAML file of the same names and flags that change it."""
    parser = HfArgumentParser(
        (ScriptArguments, SuperPretrainingArguments), description=__doc__, formatter_class=HelpFormatter
    )
    try:
        if argv and argv[0].endswith((".yaml", ".yml")):
            argv = [*read_options(argv[0]), *argv[1:]]
        script, args = parser.parse_args_into_dataclasses(argv)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, value in (
        ("model_name_or_path", script.model_name_or_path),
        ("train_files", script.train_files),
        ("output_dir", args.output_dir),
    ):
        if not value:
            parser.error(f"--{name} is missing. See --help.")
    if script.calibration_tokens and script.streaming:
        parser.error("--calibration_tokens are taken from stored text: leave out --streaming or --calibration_tokens.")
    if (script.teacher is None) != all(getattr(args, name) == 0 for name in TEACHER_WEIGHTS):
        parser.error(
            "--teacher and a --teacher_weight above 0 need each other. Give both or none of them. Instead of "
            "--teacher_weight it may be --state_weight, --pooled_weight or --first_token_weight."
        )
    if args.mlm_probability == 0 and script.head_steps:
        parser.error("--head_steps needs labels: leave it out, or give --mlm_probability a value above 0.")
    return script, args


def read_options(file: str) -> list[str]:
    """Return the options in a YAML file as words of a command line.

    All values are read as text, so they mean what they mean on the command line: `mixed_precision: no` is not a truth
    value, and `learning_rate: 5e-4` is a number, which YAML takes for text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not YAML, or has an unknown option or a value that is neither text nor a list.
    """
    try:
        options = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} must have one option per line, such as `max_steps: 1000`.")
    known = {entry.name for cls in (ScriptArguments, SuperPretrainingArguments) for entry in fields(cls)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{file}: unknown option(s) {', '.join(unknown)}. Allowed: {', '.join(sorted(known))}.")
    words = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if not values or any(not isinstance(item, str) or item.lower() in ("", "~", "null") for item in values):
            raise ValueError(
                f"{file}: {name}: {value!r} is not a value. Allowed: a number, a word, or a list of these. Leave the "
                "line out to get the default."
            )
        words += [f"--{name}", *values] if isinstance(value, list) else [f"--{name}={value}"]
    return words


# Models and text


def load_model(script: ScriptArguments, args: SuperPretrainingArguments) -> SuperShaperPreTrainedModel:
    """Return the supernet or subnet to train. It is made of a BERT if a BERT was given.

    It has a masked-LM head, unless nothing is labelled and the model in the folder has none.
    """
    name = str(script.model_name_or_path)
    config = load_pretrained("--model_name_or_path", name, AutoConfig.from_pretrained)
    flags = ("width_choices", "head_slicing", "bottlenecks", "calibration_tokens")
    given = {flag: getattr(script, flag) for flag in flags if getattr(script, flag)}
    has_head = any(architecture.endswith(HEADS) for architecture in config.architectures or [])
    model_class = SuperShaperForMaskedLM if has_head or args.mlm_probability > 0 else SuperShaperModel
    if not isinstance(config, SuperShaperConfig):
        if given.pop("calibration_tokens", 0):
            given = {"head_slicing": "per_head"} | given
        model = load_pretrained("--model_name_or_path", name, partial(model_class.from_bert, **given))
        # `calibrate` does the same. A run that resumes has calibrated weights in its checkpoint.
        model.config.full_head_scale = bool(script.calibration_tokens) and model.config.head_slicing == "per_head"
        return model
    if given:
        raise ValueError(
            f"--{' and --'.join(given)} can be chosen when a supernet is made of a BERT, but {name} is a supernet or a "
            "subnet already. Leave out what was chosen then."
        )
    if config.merged_bottlenecks and args.sampling != "fixed":
        raise ValueError(f"{name} is a subnet, which has one shape only: add --sampling fixed.")
    return load_pretrained("--model_name_or_path", name, model_class.from_pretrained)


def load_models(
    script: ScriptArguments, args: SuperPretrainingArguments
) -> tuple[SuperShaperPreTrainedModel, PreTrainedTokenizerBase, OutsideTeacher | None]:
    """Return the model to train, its tokenizer, and the outside teacher if there is one."""
    torch.manual_seed(args.seed)  # a head that the checkpoint lacks starts equal on every process and in every run
    model, teacher = load_model(script, args), None
    copy_mapped_weights(model)  # before the text is read, which may take hours
    flag = "tokenizer_name" if script.tokenizer_name else "model_name_or_path"
    tokenizer = load_pretrained(f"--{flag}", str(getattr(script, flag)), load_tokenizer)
    check_vocabulary(tokenizer, model.config)
    if script.teacher:
        teacher = OutsideTeacher(
            load_pretrained("--teacher", script.teacher, AutoModel.from_pretrained), script.teacher_layer
        )
    return model, tokenizer, teacher


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(f"{name} has no tokenizer that can be loaded. Name another one by --tokenizer_name.") from error


def load_data(
    script: ScriptArguments, args: SuperPretrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | IterableDataset, Batches]:
    """Return what to train on, and masked batches to evaluate on. They are equal on every process and in every run."""

    def sequences(text: Dataset) -> Dataset:
        workers = script.preprocessing_num_workers
        return tokenize(text, tokenizer, args.max_length, args.cross_documents, num_proc=workers)

    train = load_text(script.train_files, script.text_column, streaming=script.streaming)
    if script.validation_files:
        held_out = load_text(script.validation_files, script.text_column)
    elif script.streaming:
        return train, []
    else:
        train, held_out = split_text(train, script.validation_split_percentage / 100, args.seed)
    evaluation = sequences(held_out)
    evaluation = evaluation.select(range(min(len(evaluation), script.max_eval_samples)))
    batches = fixed_masks(evaluation, tokenizer, args.per_device_train_batch_size, args.mlm_probability, args.seed)
    return train if script.streaming else sequences(train), batches


# Training


def match_compute(summary_file: str, config: SuperShaperConfig, args: SuperPretrainingArguments, processes: int) -> int:
    """Return the number of steps in which training `args.shape` takes as many FLOPs as another run took.

    The text is assumed to be like that of the other run: its sequences have the same average length and the same
    average number of labelled tokens.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not the summary of a run.
    """
    summary = parse_json(Path(summary_file).read_bytes(), summary_file)
    numbers = ("padded_tokens", "sequences", "labelled", "flops")
    try:
        for name in numbers:
            check_number(name, summary[name], above=0)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{summary_file} is not the training_summary.json of a run that has trained: it needs numbers above 0 for "
            f"{', '.join(numbers)}."
        ) from error
    length = round(summary["padded_tokens"] / summary["sequences"])
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    labelled = round(sequences * summary["labelled"] / summary["sequences"])
    shape = args.shape or config.hidden_sizes
    return max(1, round(summary["flops"] / training_flops(config, [shape], sequences, length, labelled)))


def train_head(
    model: SuperShaperForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset,
    steps: int,
    args: SuperPretrainingArguments,
) -> str:
    """Train the masked-LM head alone, and return the status of this training."""
    head = SuperPretrainingArguments(
        max_steps=steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        learning_rate=1e-3,
        sampling="fixed",
        mlm_probability=args.mlm_probability,
        max_length=args.max_length,
        cross_documents=args.cross_documents,
        mixed_precision=args.mixed_precision,
        seed=args.seed,
    )
    model.bert.requires_grad_(False)
    summary = super_pretrain(model, tokenizer, dataset, head, description="Head only")
    model.bert.requires_grad_(True)
    return summary.status


def main() -> int:
    script, args = parse_arguments(sys.argv[1:])
    accelerator = make_accelerator(args)
    model, tokenizer, teacher = on_every_process(partial(load_models, script, args), accelerator)
    dataset, eval_batches = main_process_first(partial(load_data, script, args, tokenizer), accelerator)
    if script.match_compute:
        count = partial(match_compute, script.match_compute, model.config, args, accelerator.num_processes)
        args = replace(args, max_steps=on_every_process(count, accelerator))

    # A checkpoint holds a model that was prepared. Without one it is prepared again, with the same result.
    if not on_main_process(lambda: list_checkpoints(str(args.output_dir)), accelerator):
        if script.head_steps and train_head(model, tokenizer, dataset, script.head_steps, args) == "interrupted":
            accelerator.print("Interrupted while the head was trained, before the first checkpoint.")
            accelerator.print("Start the same command again: it begins from the start.")
            return 0
        if script.calibration_tokens:
            batches = calibration_batches(
                dataset, tokenizer, script.calibration_tokens, args.per_device_train_batch_size, args.seed
            )
            model.to(accelerator.device)
            on_every_process(partial(calibrate, model, batches, accelerator.is_main_process), accelerator)

    card = on_main_process(partial(read_sentence_encoder, str(script.model_name_or_path)), accelerator)
    if script.push_to_hub:
        card["repo_id"] = script.push_to_hub
    if not Path(str(script.model_name_or_path)).exists():
        card["base_model"] = str(script.model_name_or_path)
    summary = super_pretrain(model, tokenizer, dataset, args, eval_batches=eval_batches, teacher=teacher, card=card)
    if not accelerator.is_main_process:
        return 0
    print(f"{summary.status} after step {summary.progress.step:,}: {args.output_dir}")
    if summary.status == "interrupted":
        print("Start the same command again to continue.")
    elif script.push_to_hub:
        print(push_folder(Path(str(args.output_dir)) / "last", script.push_to_hub))
    return 0


if __name__ == "__main__":
    sys.exit(main())
