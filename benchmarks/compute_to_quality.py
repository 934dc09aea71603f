r"""Compute against quality: the training of the paper and that from the frozen original, on one picture.

    python benchmarks/compute_to_quality.py --bert PATH --text corpus/*.txt.xz --validation validation.txt \
        --pairs validation.csv --output_dir outputs/compute --tokens 140000 --seeds 0 1 2

All recipes of `RECIPES` make a supernet of the same BERT and train it on the same tokens. The supernets are measured
before training and after 1/8, 1/4, 1/2 and all of the tokens. Before the end the learning rate is still high: a run
that was planned to be shorter would be better there.

The figures compare shapes with the original, the BERT, on held-out text: the distance of the last hidden states (0 for
the original, 1 for the same guess for every token) and the cosine of embeddings. STS is explained in
`sentence_similarity.py`; it is measured before and after training. The shapes are all rectangles, in which every layer
has the same width, and 20 random ones, of which the first 6 have STS.

Operations are counted, not measured: forward and backward passes of the trained shapes, products of weights with
weights (the merging of bottlenecks, and the codes of narrow widths), forward passes of the original as a teacher, and
what comes before the first step, which is the training of a masked-LM head that the BERT lacks, or the calibration.
Backward passes are counted as if every weight learned.

Every figure is written to `points.jsonl` in the output folder as soon as it is measured. The same command goes on where
it was stopped; it first measures the checkpoints that are there. The models before training are made in processes of
their own, whose time and peak memory are printed.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sentence_similarity import load_pairs, similarity_score
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from supershaper_hf import (
    SearchSpace,
    SuperPretrainingArguments,
    SuperShaperConfig,
    SuperShaperForMaskedLM,
    SuperShaperModel,
    calibrate,
    calibration_batches,
    evaluate_shapes,
    fixed_masks,
    load_text,
    markdown_table,
    read_pooling,
    super_pretrain,
    tokenize,
)
from supershaper_hf.checks import check_count
from supershaper_hf.devices import device_name
from supershaper_hf.files import parse_json, read_json, to_json, write_folder, write_json
from supershaper_hf.model.costs import flops_cost
from supershaper_hf.model.modeling_supershaper import SuperShaperPreTrainedModel
from supershaper_hf.processes import start_accelerator
from supershaper_hf.report.plots import new_figure
from supershaper_hf.training.checkpoints import checkpoint_folder, list_checkpoints
from supershaper_hf.training.progress import Progress
from supershaper_hf.training.resuming import read_state
from supershaper_hf.training.sandwich import step_shapes
from supershaper_hf.training.teacher import OutsideTeacher


@dataclass(frozen=True)
class Recipe:
    """How a supernet is made of a BERT and trained.

    Attributes:
        name: What it is called in tables and in the picture.
        start: Which of `STARTS` it begins with.
        training: Options of `super_pretrain`.
    """

    name: str
    start: str
    training: dict[str, Any]


STARTS: dict[str, dict[str, Any]] = {  # arguments of `from_bert`; those per head are calibrated
    "paper": {"head_slicing": "prefix", "hidden_dropout_prob": 0.0},
    "identity": {"head_slicing": "prefix"},
    "shared": {"head_slicing": "per_head"},
    "by_width": {"head_slicing": "per_head", "bottlenecks": "by_width"},
}
PAPER = {"mlm_probability": 0.15, "sampling": "sandwich", "random_shapes": 1, "learning_rate": 2e-4}
FROM_ORIGINAL = {
    "mlm_probability": 0.0,
    "sampling": "random",
    "random_shapes": 3,
    "distribution": "budget",
    "no_dropout": True,
    "state_weight": 1.0,
    "pooled_weight": 1.0,
    "learning_rate": 3e-4,
}
# The recipe of examples/make_supernet.py, without its grouping of sequences by length, so that all recipes read the
# same batches.
OURS = FROM_ORIGINAL | {"learning_rate": 5e-4, "shared_learning_rate_scale": 0.6}
RECIPES = {
    "paper": Recipe("the paper", "paper", PAPER),
    "original_teaches": Recipe("the paper's start, the original teaches", "identity", FROM_ORIGINAL),
    "calibrated": Recipe("calibrated, shared bottlenecks", "shared", FROM_ORIGINAL),
    "ours": Recipe("ours: calibrated, by width", "by_width", OURS),
    "ours_frozen": Recipe("ours, shared weights frozen", "by_width", OURS | {"shared_learning_rate_scale": 0.0}),
}
CALIBRATION_TOKENS = 50_000
HEAD_SHARE = 0.25  # steps that train a masked-LM head that the BERT lacks, as a share of the steps of the run
EIGHTHS = (0, 1, 2, 4, 8)  # of the tokens, after which a supernet is measured
NUM_SHAPES, SHAPES_WITH_STS, SHAPES_SEED = 20, 6, 2021
START_FILE, START_FORMAT = "start.json", "supershaper-hf start 1"
FIGURES = ("distance", "cosine", "sts")
POINTS_FILE, PICTURE = "points.jsonl", "compute_to_quality.png"

Point = dict[str, Any]


class Material(NamedTuple):
    """What all runs are made of and measured with."""

    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sequences: Dataset  # to train on
    batches: list[dict[str, torch.Tensor]]  # to measure on
    pairs: list[tuple[str, str]]
    labels: np.ndarray
    pooling: str


# Text and steps


def load_sequences(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return tokenize(load_text(args.text), tokenizer, args.max_length)


def load_material(args: argparse.Namespace) -> Material:
    """Load the original, the text and the pairs. What is measured on is the same for all recipes and seeds."""
    tokenizer = AutoTokenizer.from_pretrained(args.bert)
    held_out = tokenize(load_text(args.validation), tokenizer, args.max_length).shuffle(seed=0)
    held_out = held_out.select(range(min(len(held_out), args.max_eval_samples)))
    pairs, labels = load_pairs(args.pairs)
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), args.max_pairs)).astype(int))  # of all genres
    return Material(
        AutoModel.from_pretrained(args.bert).eval().to(start_accelerator().device),
        tokenizer,
        load_sequences(args, tokenizer),
        fixed_masks(held_out, tokenizer, args.per_device_train_batch_size, mlm_probability=0),
        [pairs[index] for index in chosen],
        labels[chosen],
        read_pooling(args.bert) or "mean",
    )


def mean_length(sequences: Dataset) -> float:
    """Return the mean number of tokens of a sequence, estimated from 1,000 of them."""
    chosen = np.linspace(0, len(sequences) - 1, min(len(sequences), 1000)).astype(int)
    return statistics.fmean(map(len, sequences.select(chosen)["input_ids"]))


def training_arguments(
    args: argparse.Namespace, recipe: Recipe, seed: int, sequences: Dataset, output_dir: Path
) -> SuperPretrainingArguments:
    """Return the options of a run: about `args.tokens` tokens, and a checkpoint after each eighth of the steps."""
    eighth = max(1, round(args.tokens / 8 / args.per_device_train_batch_size / mean_length(sequences)))
    return SuperPretrainingArguments(
        max_steps=8 * eighth,
        save_steps=eighth,
        save_total_limit=8,
        per_device_train_batch_size=args.per_device_train_batch_size,
        max_length=args.max_length,
        seed=seed,
        output_dir=str(output_dir),
        pooling=read_pooling(args.bert) or "mean",
        **recipe.training,
    )


# The models before training


def make_start(args: argparse.Namespace, name: str, seed: int, folder: Path) -> None:
    """Make the supernet of a recipe, and save it with its seconds, operations and the peak memory of this process."""
    recipe, tokenizer = RECIPES[name], AutoTokenizer.from_pretrained(args.bert)
    sequences = load_sequences(args, tokenizer)
    options = training_arguments(args, recipe, seed, sequences, folder)
    torch.manual_seed(seed)  # of a head that the BERT lacks
    began, began_computing, flops = time.perf_counter(), time.process_time(), 0
    model_class = SuperShaperForMaskedLM if options.mlm_probability > 0 else SuperShaperModel
    model, info = model_class.from_bert(args.bert, output_loading_info=True, **STARTS[recipe.start])
    model.to(start_accelerator().device)
    if STARTS[recipe.start]["head_slicing"] == "per_head":
        batch_size = args.per_device_train_batch_size
        batches = calibration_batches(sequences, tokenizer, CALIBRATION_TOKENS, batch_size, seed)
        with FlopCounterMode(display=False) as counter:
            calibrate(model, batches, progress=True)
        flops = counter.get_total_flops()
    elif any(key.startswith("cls.") for key in info["missing_keys"]) and options.mlm_probability > 0:
        flops = train_head(model, tokenizer, sequences, options)
    figures = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - began_computing,
        "peak_megabytes": peak_megabytes(),
        "flops": flops,
    }

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        write_json(partial / START_FILE, START_FORMAT, figures)

    write_folder(folder, write)


def train_head(
    model: SuperShaperForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Dataset,
    options: SuperPretrainingArguments,
) -> int:
    """Train the masked-LM head alone; return the operations: the encoder has no backward pass."""
    head = SuperPretrainingArguments(
        max_steps=math.ceil(HEAD_SHARE * options.max_steps),
        per_device_train_batch_size=options.per_device_train_batch_size,
        max_length=options.max_length,
        learning_rate=1e-3,
        sampling="fixed",
        seed=options.seed,
    )
    model.bert.requires_grad_(False)
    summary = super_pretrain(model, tokenizer, sequences, head, description="Head only")
    model.bert.requires_grad_(True)
    if summary.status != "finished":
        raise SystemExit("Interrupted while the head was trained. Start the same command again.")
    config = model.config
    both = 3 * 2 * summary.progress.labelled * config.hidden_size * (config.hidden_size + config.vocab_size)
    return int(both + (summary.progress.flops - both) / 3)


def peak_megabytes() -> float | None:
    """Return the peak resident memory of this process in MB (10^6 bytes); None where the system does not tell it."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else None


def in_own_process(function: Callable[..., None], *arguments: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} ended with status {process.exitcode}.")


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


def run_flops(
    config: SuperShaperConfig, options: SuperPretrainingArguments, progress: Progress, start_flops: int
) -> dict[str, float]:
    """Count the operations of a run up to a checkpoint: see the top of this file."""
    space = SearchSpace.from_config(config)
    shapes = [shape for step in range(progress.step) for shape in step_shapes(space, options, step)]
    taught = options.state_weight > 0
    parts = {
        "start": start_flops,
        "passes": progress.flops,
        "weights": 3 * sum(weight_flops(config, shape) for shape in shapes if shape is not None),
        "teacher": original_flops(config, progress) if taught else 0,
    }
    return {"flops": sum(parts.values())} | {f"flops_{name}": count for name, count in parts.items()}


# Measuring


def measure(model: SuperShaperPreTrainedModel, material: Material, with_sts: bool) -> dict[str, list[dict[str, Any]]]:
    """Return distance and cosine of all rectangles and of the random shapes, and the STS of some of them."""
    space = SearchSpace.from_config(model.config)
    groups = {
        "rectangles": [[width] * space.num_layers for width in reversed(space.width_choices)],
        "random": space.sample(NUM_SHAPES, seed=SHAPES_SEED).tolist(),
    }
    shapes = [shape for group in groups.values() for shape in group]
    model.to(material.original.device)  # type: ignore[arg-type]
    encoder: Any = model.base_model
    records = evaluate_shapes(model, material.batches, shapes, measure="distance", original=material.original)
    found = {}
    for name, group in groups.items():
        found[name], records = records[: len(group)], records[len(group) :]
        for number, record in enumerate(found[name] if with_sts else []):
            if name == "rectangles" or number < SHAPES_WITH_STS:
                given = (material.tokenizer, material.pairs, material.labels, material.pooling)
                record["sts"] = similarity_score(encoder, *given, shape=record["shape"])
    return found


def settings_of(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return what a point depends on, but for its recipe's name, its seed and the tokens it has seen."""
    given = {key: value for key, value in vars(args).items() if key not in ("output_dir", "seeds", "recipes")}
    fixed = {
        "start": STARTS[RECIPES[name].start],
        "calibration_tokens": CALIBRATION_TOKENS,
        "head_share": HEAD_SHARE,
    }
    return json.loads(json.dumps({**given, **fixed, "recipe": asdict(RECIPES[name])}))


def read_points(file: Path) -> list[Point]:
    """Read the points measured so far. Half a line at the end, which a kill may leave, is left out of the file too."""
    *lines, rest = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
    if rest:
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [parse_json(line, str(file)) for line in lines]


def run_recipe(args: argparse.Namespace, name: str, seed: int, material: Material, points: list[Point]) -> None:
    """Make, train and measure a recipe with one seed. Points that it has already are not measured again.

    Raises:
        ValueError: If the output folder holds points of this recipe that were measured in another way.
    """
    recipe, settings = RECIPES[name], settings_of(args, name)
    folder, start_folder = (Path(args.output_dir) / f"{each}-{seed}" for each in (name, f"start-{recipe.start}"))
    own = [point for point in points if (point["recipe"], point["seed"]) == (name, seed)]
    for point in own:
        changed = sorted(key for key in settings if point["settings"].get(key) != settings[key])
        if changed:
            raise ValueError(
                f"{args.output_dir} holds points of the recipe {name} that were measured with other settings: "
                f"{', '.join(changed)}. Choose another output_dir."
            )
    missing = sorted(set(EIGHTHS).difference(point["eighths"] for point in own))
    if not missing:
        return
    if not start_folder.exists():
        in_own_process(make_start, args, name, seed, start_folder)
    start = read_json(start_folder / START_FILE, START_FORMAT)
    options = training_arguments(args, recipe, seed, material.sequences, folder)
    model_class = SuperShaperForMaskedLM if options.mlm_probability > 0 else SuperShaperModel

    def add_point(eighths: int) -> None:
        checkpoint = checkpoint_folder(folder, eighths * options.save_steps)
        progress = read_state(checkpoint).progress if eighths else Progress()
        model = model_class.from_pretrained(checkpoint if eighths else start_folder)
        point = {
            "recipe": name,
            "seed": seed,
            "eighths": eighths,
            "steps": progress.step,
            "tokens": progress.tokens,
            **run_flops(model.config, options, progress, start["flops"]),
            "seconds": start["seconds"] + progress.seconds,
            "start": {key: start[key] for key in ("seconds", "cpu_seconds", "peak_megabytes")},
            "device": device_name(material.original.device),
            "threads": torch.get_num_threads(),
            **measure(model, material, with_sts=eighths in (0, 8)),
            "settings": settings,
        }
        with (Path(args.output_dir) / POINTS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(f"{to_json(point)}\n")
        points.append(point)
        print(f"{name}, seed {seed}, {progress.tokens:,} tokens: distance {mean_of(point, 'random', 'distance'):.3f}")

    def add_points() -> None:
        """Measure the missing points whose models exist."""
        existing = list_checkpoints(folder)
        for eighths in tuple(missing):
            if eighths == 0 or checkpoint_folder(folder, eighths * options.save_steps) in existing:
                add_point(eighths)
                missing.remove(eighths)

    add_points()
    if missing:
        train(model_class.from_pretrained(start_folder), material, options, recipe.name)
    add_points()
    for checkpoint in list_checkpoints(folder):  # several gigabytes; `last` stays
        shutil.rmtree(checkpoint)


def train(
    model: SuperShaperPreTrainedModel, material: Material, options: SuperPretrainingArguments, description: str
) -> None:
    teacher = OutsideTeacher(material.original) if options.state_weight > 0 else None
    given = (model, material.tokenizer, material.sequences, options)
    if super_pretrain(*given, teacher=teacher, description=description).status == "interrupted":
        raise SystemExit("Interrupted. Start the same command again: it goes on from here.")


# Tables and the picture


def mean_of(point: Point, group: str, key: str) -> float:
    """Return the mean of a figure over the shapes of a group that have it; NaN if none has."""
    values = [record[key] for record in point[group] if key in record]
    return statistics.fmean(values) if values else math.nan


def curve(points: Sequence[Point], name: str) -> list[tuple[float, float]]:
    """Return operations and distance of the random shapes, as means over the seeds, from the start to the end."""
    found = []
    for eighths in EIGHTHS:
        own = [point for point in points if (point["recipe"], point["eighths"]) == (name, eighths)]
        if own:
            distances = [mean_of(point, "random", "distance") for point in own]
            found.append((statistics.fmean(point["flops"] for point in own), statistics.fmean(distances)))
    return found


def flops_to_reach(points: Sequence[tuple[float, float]], distance: float) -> float | None:
    """Return the operations after which a curve is at a distance or below for the first time; None if it never is.

    Between two points the curve is taken for a straight line.
    """
    before: tuple[float, float] | None = None
    for flops, reached in points:
        if reached <= distance:
            if before is None:
                return flops
            share = (before[1] - distance) / (before[1] - reached)
            return before[0] + share * (flops - before[0])
        before = flops, reached
    return None


def cell(records: Sequence[Mapping[str, float]]) -> str:
    """Return the means of distance, cosine and STS over several records."""
    return " / ".join(f"{statistics.fmean(record[key] for record in records):.3f}" for key in FIGURES)


def table(points: Sequence[Point], eighths: int) -> list[dict[str, str]]:
    """Return a row per recipe: the figures of the rectangles, and means over the random shapes.

    The last column is the standard deviation, over the seeds, of the mean distance of the random shapes.
    """
    rows = []
    for name, recipe in RECIPES.items():
        own = [point for point in points if (point["recipe"], point["eighths"]) == (name, eighths)]
        if not own:
            continue
        row = {"recipe": recipe.name, "seeds": str(len(own))}
        for number, record in enumerate(own[0]["rectangles"]):
            row[str(record["shape"][0])] = cell([point["rectangles"][number] for point in own])
        row["random"] = cell([{key: mean_of(point, "random", key) for key in FIGURES} for point in own])
        distances = [mean_of(point, "random", "distance") for point in own]
        row["spread"] = f"{statistics.stdev(distances):.3f}" if len(own) > 1 else "-"
        rows.append(row)
    return rows


def effort(points: Sequence[Point]) -> list[dict[str, str]]:
    """Return a row per recipe with what it took, and its share of the paper's operations for the paper's distance."""
    curves = {name: curve(points, name) for name in RECIPES}
    goal = curves["paper"][-1] if len(curves["paper"]) == len(EIGHTHS) else None
    rows = []
    for name, recipe in RECIPES.items():
        own = [point for point in points if (point["recipe"], point["eighths"]) == (name, EIGHTHS[-1])]
        if not own:
            continue
        reached = None if goal is None else flops_to_reach(curves[name], goal[1])
        peaks = [point["start"]["peak_megabytes"] for point in own if point["start"]["peak_megabytes"] is not None]
        rows.append(
            {
                "recipe": recipe.name,
                "start, s": f"{statistics.fmean(point['start']['seconds'] for point in own):.0f}",
                "start, CPU s": f"{statistics.fmean(point['start']['cpu_seconds'] for point in own):.0f}",
                "start, peak MB": f"{max(peaks):,.0f}" if peaks else "-",
                "start, PFLOP": f"{statistics.fmean(point['flops_start'] for point in own) / 1e15:.4f}",
                "all, s": f"{statistics.fmean(point['seconds'] for point in own):,.0f}",
                "all, PFLOP": f"{curves[name][-1][0] / 1e15:.4f}",
                "PFLOP to the paper's distance": "-" if reached is None else f"{reached / 1e15:.4f}",
                "share of the paper's": "-" if goal is None or reached is None else f"{reached / goal[0]:.1%}",
            }
        )
    return rows


def draw(file: Path, points: Sequence[Point]) -> None:
    """Draw distance over operations. A start without any operations is drawn at the left edge, with a hollow mark."""
    curves = {name: found for name in RECIPES if (found := curve(points, name))}
    edge = min(flops for found in curves.values() for flops, _ in found if flops > 0) / 2
    figure, axes = new_figure()
    for number, (name, found) in enumerate(curves.items()):
        color = f"C{number}"
        places = [(max(flops, edge), distance) for flops, distance in found]
        axes.plot(*zip(*places), color=color, marker=".", label=RECIPES[name].name)
        if found[0][0] == 0:
            axes.plot(*places[0], "o", color=color, markerfacecolor="white")
        for point in points:
            if point["recipe"] == name:
                axes.plot(max(point["flops"], edge), mean_of(point, "random", "distance"), ".", color=color, alpha=0.3)
    axes.set_xscale("log")
    axes.set_xlabel("operations of start and training (hollow: a start without any)")
    axes.set_ylabel(f"distance to the original, mean of {NUM_SHAPES} random shapes")
    axes.legend()
    figure.savefig(file, dpi=130)


def report(args: argparse.Namespace, points: Sequence[Point], material: Material) -> None:
    chosen = [point for point in points if point["recipe"] in args.recipes and point["seed"] in args.seeds]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in material.batches)
    devices = " and ".join(sorted({point["device"] for point in chosen}))
    print(f"\n{devices}. Distance and cosine on {tokens:,} held-out tokens, STS on {len(material.pairs)} pairs.")
    for title, eighths in (("Before training", 0), ("After all tokens", EIGHTHS[-1])):
        rows = table(chosen, eighths)
        if rows:
            counts = {point["tokens"] for point in chosen if point["eighths"] == eighths}
            print(f"\n{title} ({max(counts):,} tokens): distance / cosine / STS\n\n{markdown_table(rows)}")
    rows = effort(chosen)
    if rows:
        print(f"\n{markdown_table(rows)}")
    draw(Path(args.output_dir) / PICTURE, chosen)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bert", required=True, help="folder or Hub id of the BERT, with or without masked-LM head")
    parser.add_argument("--text", nargs="+", required=True, help="training text, one document a line")
    parser.add_argument("--validation", required=True, help="held-out text, one document a line")
    parser.add_argument("--pairs", required=True, help="CSV file of STS-B: sentence1, sentence2 and label")
    parser.add_argument("--output_dir", required=True, help="folder for points, picture and runs")
    parser.add_argument("--tokens", type=int, default=140_000, help="tokens that each run trains on")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="every recipe is run with each of these seeds"
    )
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=[*RECIPES], help="recipes to run, in this order"
    )
    parser.add_argument("--max_length", type=int, default=64, help="tokens of the longest sequence")
    parser.add_argument("--per_device_train_batch_size", type=int, default=24, help="sequences in a step")
    parser.add_argument("--max_eval_samples", type=int, default=200, help="largest number of held-out sequences")
    parser.add_argument("--max_pairs", type=int, default=750, help="largest number of pairs")
    args = parser.parse_args()
    for option in ("tokens", "max_length", "per_device_train_batch_size", "max_eval_samples"):
        check_count(option, getattr(args, option))
    check_count("max_pairs", args.max_pairs, 2)
    return args


def main() -> None:
    args = parse_arguments()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    points = read_points(output / POINTS_FILE)
    material = load_material(args)
    for seed in args.seeds:
        for name in args.recipes:
            run_recipe(args, name, seed, material, points)
    report(args, points, material)


if __name__ == "__main__":
    main()
