"""Training runs that are compared: each is a recipe with a seed, and has points after a quarter, a half and all tokens.

All supernets are made of one BERT and read the same batches in the same order. A recipe says what they start from and
what they learn. Points are rows of one file, `runs.json`, which the scripts of four questions share: what one of them
has measured, the others find. The learning rate still falls before the end: a run that was planned to be shorter would
be better there.

Operations are counted, not measured: forward and backward passes of the trained shapes, products of weights with
weights (the merging of bottlenecks, and the codes of narrow widths), forward passes of the original as a teacher, and
the calibration of the start. Backward passes are counted as if every weight learned. Not counted are the products
inside losses that compare attention, and the training of the masked-LM head, which all supernets are made with.
"""

import argparse
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from supershaper_hf import (
    SearchSpace,
    SuperPretrainingArguments,
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    calibrate,
    calibration_batches,
    super_pretrain,
)
from supershaper_hf.files import read_json, write_folder, write_json
from supershaper_hf.model.costs import flops_cost
from supershaper_hf.processes import start_accelerator
from supershaper_hf.training.checkpoints import checkpoint_folder, list_checkpoints
from supershaper_hf.training.progress import Progress
from supershaper_hf.training.resuming import read_state
from supershaper_hf.training.sandwich import step_shapes
from supershaper_hf.training.teacher import OutsideTeacher

from .head import bert_with_head
from .material import Material, add_options, load_material, mean_length, measure, measured_shapes
from .study import Results, Row, encoder_parameters, make_parser


QUESTION = "runs"
PATHS = ("data", "bert", "supernet", "output_dir", "results", "seeds")  # options that rows do not depend on
START_FILE, START_FORMAT = "start.json", "supershaper-hf start 2"

STARTS: dict[str, dict[str, str]] = {  # arguments of `from_bert`; all but the first are calibrated
    "identity": {"head_slicing": "prefix"},
    "shared_prefix": {"head_slicing": "prefix"},
    "shared_per_head": {"head_slicing": "per_head"},
    "by_width_prefix": {"head_slicing": "prefix", "bottlenecks": "by_width"},
    "by_width_per_head": {"head_slicing": "per_head", "bottlenecks": "by_width"},
}
# What does not differ: batches, dropout, and learning rates. Weights that all widths share learn with 3e-4.
COMMON: dict[str, Any] = {
    "no_dropout": True,
    "learning_rate": 5e-4,
    "shared_learning_rate_scale": 0.6,
    "group_by_length": True,
}
SANDWICH = {**COMMON, "sampling": "sandwich", "random_shapes": 1}
LABELS = {"mlm_probability": 0.15, "distillation_weight": 0.0}
PAPER = {**SANDWICH, "mlm_probability": 0.15, "distillation_weight": 0.5}
STATES = {"mlm_probability": 0.0, "state_weight": 1.0}
OURS = {**COMMON, **STATES, "pooled_weight": 1.0, "sampling": "random", "random_shapes": 3, "distribution": "budget"}


@dataclass(frozen=True)
class Recipe:
    """What a supernet starts from and learns from.

    Attributes:
        name: The name of its folder.
        start: One of `STARTS`.
        training: Options of `super_pretrain`.
        quarters: After how many quarters of the tokens it is measured.
        shape: Which of the chosen shapes is cut from the start and trained alone; by default none.
    """

    name: str
    start: str
    training: Mapping[str, Any] = field(default_factory=dict)
    quarters: tuple[int, ...] = (4,)
    shape: int | None = None

    def key(self) -> dict[str, Any]:
        """Return what tells its rows from those of others."""
        return {"start": self.start, "training": dict(self.training), "shape": self.shape}


FOLLOWED = (1, 2, 4)
OURS_BY_WIDTH = Recipe("ours", "by_width_per_head", OURS, FOLLOWED)
OURS_SHARED = Recipe("ours_shared", "shared_per_head", OURS, FOLLOWED)
# The masked-LM loss is several nats, the error of the states below one: so weights of 10 keep the encoder near the
# original.
OURS_WITH_LABELS = Recipe(
    "ours_labels",
    "by_width_per_head",
    {**OURS, "mlm_probability": 0.15, "state_weight": 10.0, "pooled_weight": 10.0},
    FOLLOWED,
)
PAPER_BY_WIDTH = Recipe("in_place", "by_width_per_head", PAPER, FOLLOWED)


# Running


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Read the command line of a script of runs."""
    parser = make_parser(description)
    add_options(parser)
    return parser.parse_args()


class Runs:
    """What the scripts of runs share: options, rows, and the material, which is loaded when something is missing.

    Args:
        args: What `parse_arguments` returns.

    Raises:
        ValueError: If the rows that are there were measured with other settings.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        settings = {name: value for name, value in vars(args).items() if name not in PATHS}
        self.results = Results(args.results, QUESTION, settings)

    @cached_property
    def material(self) -> Material:
        start_accelerator(mixed_precision=self.args.mixed_precision)  # the first one of a process decides
        return load_material(self.args, bert_with_head(self.args))

    def run(self, recipe: Recipe, seed: int) -> None:
        """Make, train and measure a recipe with one seed, unless its rows are there.

        Raises:
            SystemExit: If the training was interrupted. The same command continues.
        """
        identity = {"seed": seed, **recipe.key()}
        missing = [each for each in recipe.quarters if not self.results.find(**identity, quarters=each)]
        if not missing:
            return
        start = self.start(recipe.start, seed)
        folder = self.args.output_dir / "runs" / f"{recipe.name}-{seed}"
        options = training_arguments(self.args, recipe, seed, self.material, folder)
        model = self.load(start)
        if recipe.shape is not None:
            model = model.extract_subnet(measured_shapes(self.args, model.config)["chosen"][recipe.shape])
        train(model, self.material, options, f"{recipe.name}, seed {seed}")
        for quarters in missing:
            checkpoint = checkpoint_folder(folder, quarters * options.save_steps)
            progress, model = read_state(checkpoint).progress, SuperShaperForMaskedLM.from_pretrained(checkpoint)
            counted = run_flops(model.config, options, progress)
            self.add({"name": recipe.name, **identity, "quarters": quarters}, model, start, progress, counted)
        for checkpoint in list_checkpoints(folder):  # a gigabyte each run; `last` stays
            shutil.rmtree(checkpoint)

    def start(self, name: str, seed: int) -> Path:
        """Return the folder of the supernet that runs start from. It is made and measured if it is not there yet."""
        folder = self.args.output_dir / "runs" / f"start-{name}-{seed}"
        if not folder.exists():
            make_start(self.args, self.material, name, seed, folder)
        identity = {"seed": seed, **Recipe(name, name).key(), "quarters": 0}
        if not self.results.find(**identity):
            self.add({"name": name, **identity}, SuperShaperForMaskedLM.from_pretrained(folder), folder, Progress(), {})
        return folder

    def load(self, folder: Path) -> Any:
        """Return a supernet to train. On CPUs, torch's fused attention is slow in bfloat16."""
        slow = self.material.accelerator.device.type == "cpu" and self.args.mixed_precision == "bf16"
        return SuperShaperForMaskedLM.from_pretrained(folder, attn_implementation="eager" if slow else "sdpa")

    def add(self, identity: Row, model: Any, start: Path, progress: Progress, flops: Mapping[str, float]) -> None:
        """Measure a model and add its row: a supernet at all shapes, a subnet at its own."""
        began, made = time.perf_counter(), read_json(start / START_FILE, START_FORMAT)
        alone = identity["shape"] is not None
        groups = {"chosen": [None]} if alone else measured_shapes(self.args, model.config)
        scored = {
            "chosen": len(groups["chosen"]),
            "rectangles": len(groups.get("rectangles", ())),
            "random": self.args.num_sts,
        }
        ends = identity["quarters"] in (0, 4)
        found = measure(model, self.material, groups, scored if ends else {})
        counted = {"start": made["flops"], **flops}
        row = {
            **identity,
            "steps": progress.step,
            "tokens": progress.tokens,
            "flops": sum(counted.values()),
            "flops_of": counted,
            "seconds": {
                "start": made["seconds"],
                "training": round(progress.seconds, 1),
                "measuring": round(time.perf_counter() - began, 1),
            },
        }
        if alone:
            own = sum(parameter.numel() for parameter in model.base_model.encoder.parameters())
            row["share_of_encoder"] = own / encoder_parameters(model.config)
        self.results.add({**row, **found})
        print(f"{identity['name']}, seed {identity['seed']}, {progress.tokens:,} tokens: measured", flush=True)


def make_start(args: argparse.Namespace, material: Material, name: str, seed: int, folder: Path) -> None:
    """Make a supernet, and save it with the seconds and the operations that this took."""
    began, flops = time.perf_counter(), 0
    model = SuperShaperForMaskedLM.from_bert(
        material.folder, width_choices=args.width_choices, hidden_dropout_prob=0.0, **STARTS[name]
    )
    model.to(material.accelerator.device)
    if name != "identity":
        given = (material.tokenizer, args.calibration_tokens, args.batch_size, seed)
        batches = calibration_batches(material.sequences, *given)
        with FlopCounterMode(display=False) as counter:
            calibrate(model, batches)
        flops = counter.get_total_flops()
    figures = {"seconds": round(time.perf_counter() - began, 1), "flops": flops}

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        write_json(partial / START_FILE, START_FORMAT, figures)

    write_folder(folder, write)


def training_arguments(
    args: argparse.Namespace, recipe: Recipe, seed: int, material: Material, folder: Path
) -> SuperPretrainingArguments:
    """Return the options of a run: about `args.tokens` tokens, and a checkpoint after each quarter of the steps."""
    quarter = max(1, round(args.tokens / 4 / args.batch_size / mean_length(material.sequences)))
    return SuperPretrainingArguments(
        max_steps=4 * quarter,
        save_steps=quarter,
        save_total_limit=8,  # those of the quarters, and of interruptions in between; all are removed at the end
        per_device_train_batch_size=args.batch_size,
        max_length=args.max_length,
        mixed_precision=args.mixed_precision,
        seed=seed,
        output_dir=str(folder),
        pooling=material.pooling,
        **recipe.training,
    )


def is_taught(options: SuperPretrainingArguments) -> bool:
    """Return whether the original teaches."""
    return options.state_weight > 0 or options.teacher_weight > 0


def train(model: Any, material: Material, options: SuperPretrainingArguments, description: str) -> None:
    """Train a model, or go on from its last checkpoint."""
    teacher = OutsideTeacher(material.original) if is_taught(options) else None
    given = (model, material.tokenizer, material.sequences, options)
    if super_pretrain(*given, teacher=teacher, description=description).status == "interrupted":
        raise SystemExit("Interrupted. Start the same command again: it goes on from here.")


# Operations


def original_flops(config: Any, progress: Progress) -> float:
    """Count the operations of the original's forward passes on what a run has read, as if all batches were as long."""
    if progress.sequences == 0:
        return 0.0
    length = round(progress.padded_tokens / progress.sequences)
    layers = config.num_hidden_layers * flops_cost(config, length).layer(config.hidden_size)
    return layers * progress.padded_tokens / length


def weight_flops(config: SuperShaperConfig, shape: Sequence[int]) -> int:
    """Count the products of weights with weights in the forward pass of a shape, however many tokens it has.

    Two neighbouring bottlenecks are merged. With bottlenecks by width, the maps beside a code are multiplied by it.
    """
    full, ffn = config.hidden_size, config.intermediate_size
    merged = sum(2 * full * before * after for before, after in itertools.pairwise(shape))
    coded = [(width, full - width) for width in shape if config.has_own_maps(width)]
    return merged + sum(2 * width * rest * (full + 7 * width + 3 * ffn) for width, rest in coded)


def run_flops(config: SuperShaperConfig, options: SuperPretrainingArguments, progress: Progress) -> dict[str, float]:
    """Count the operations of a run up to a checkpoint, without those of its start: see the top of this file."""
    weights = 0
    if options.sampling != "fixed":  # a subnet has its products already
        space = SearchSpace.from_config(config)
        shapes = [shape for step in range(progress.step) for shape in step_shapes(space, options, step)]
        weights = 3 * sum(weight_flops(config, shape) for shape in shapes if shape is not None)
    teacher = original_flops(config, progress) if is_taught(options) else 0
    return {"passes": progress.flops, "weights": weights, "teacher": teacher}


def run_script(
    description: str | None, plan: Sequence[tuple[Recipe, Sequence[int]]], answer: Callable[[Path, Path], str]
) -> None:
    """Read the command line, run each recipe with each of its seeds unless it was, and print the answer."""
    args = parse_arguments(description)
    runs = Runs(args)
    for recipe, seeds in plan:
        for seed in args.seeds or seeds:
            runs.run(recipe, seed)
    print(answer(args.results, args.output_dir))
