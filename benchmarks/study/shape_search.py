"""Question 4: are searched shapes better than hand-crafted ones, and can what the search relies on be trusted?

    python -m benchmarks.study.shape_search --data DATA --bert MINILM

1. At three budgets, shapes of equal size: the best of the front, the best after one more round of measuring, the one
   that the evolutionary search of the paper finds with the same predictor, the heuristic (the profile of the front),
   and the hand-crafted shapes. Each is measured as it is cut out of the supernet, on held-out text that the search did
   not use, and after it was trained alone for a few tokens, as many for each.
2. The predictor, on random shapes that it was not fitted on, measured on the text of the search.
3. The distance to the original, in the last layer and in all, as a substitute for the scores of tasks: they are known
   of the same random shapes. The scores are those of question 6 (`tasks.json`).

Alone, a shape is first refitted in closed form and then trained, as by examples/polish_subnet.py. Without the refit,
first_layers would be an unfairly weak baseline: its last bottleneck has only seen the states of the last layer, and the
few steps of training do not make up for that.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer

from supershaper_hf import (
    SearchSpace,
    ShapePredictor,
    SuperPretrainingArguments,
    SuperShaperModel,
    calibration_batches,
    derive_profile,
    evaluate_shapes,
    evolutionary_search,
    fixed_masks,
    load_text,
    pareto_front,
    polish,
    read_pooling,
    super_pretrain,
    tokenize,
)
from supershaper_hf.data.batches import count_tokens
from supershaper_hf.processes import start_accelerator
from supershaper_hf.report.findings import PREDICTOR_FILE, RECORDS_FILE
from supershaper_hf.search.fingerprints import fingerprint_data, fingerprint_encoder
from supershaper_hf.search.records import Contents, Record, parse
from supershaper_hf.search.rounds import best_measured, propose_shapes
from supershaper_hf.training.teacher import OutsideTeacher

from ..sentence_similarity import load_pairs, similarity_score
from .found_shapes import (
    ALL_LAYERS,
    BUDGET_SHARES,
    BUDGETS,
    DISTANCE,
    EVOLUTIONARY,
    HEURISTIC,
    MEASURED,
    PARTS,
    QUESTION,
)
from .shape_search_answer import answer, targets
from .shapes import HAND_CRAFTED, NUM_RANDOM, RECTANGLE, SEARCHED, budget, hand_crafted, random_shapes
from .study import STS, Results, Row, held_out_text, make_parser, task_file, training_text


RECIPE: dict[str, Any] = {  # as in examples/polish_subnet.py
    "sampling": "fixed",
    "mlm_probability": 0.0,
    "state_weight": 1.0,
    "pooled_weight": 5.0,
    "no_dropout": True,
}
# Highest learning rates. That of the example, 3e-4, is for 300 steps. In the 52 steps of this study it took a rectangle
# from a distance of .333 to .339, and 1e-4 to .330. A shape that drops layers is trained with both, because the
# supernet was never trained to drop any; the one with the lower distance counts.
RATES = (1e-4, 3e-4)
SEEDS = (0, 1, 2)
REPEATED = {(0.60, SEARCHED), (0.60, RECTANGLE)}  # trained with every seed, all others with the first
NUM_PARTS = 20  # of the held-out text and of the pairs, for the error of a difference
PREDICTED_SHARES = tuple(round(0.25 + 0.01 * step, 2) for step in range(81))  # of the encoder, up to 105 %
ROUND = 20  # shapes that are measured for one budget
HELD_OUT_SEED = 50  # of the shapes that the predictor is tested on
TOLERANCE = 0.01  # between a distance in the records of the search and the same one here
PATHS = ("data", "bert", "supernet", "search", "output_dir", "results", "seeds")  # options that rows do not depend on

Shape = list[int]

__all__ = ["answer", "main", "targets"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line. The defaults are those of the study."""
    parser = make_parser(__doc__)
    parser.add_argument("--search", type=Path, help="folder of its search; by default the folder search in --supernet")
    parser.add_argument("--search_max_length", type=int, default=128, help="tokens of a sequence in the search")
    parser.add_argument("--search_batch_size", type=int, default=64, help="sequences of a batch in the search")
    parser.add_argument("--max_eval_samples", type=int, default=200, help="sequences that shapes are measured on")
    parser.add_argument("--num_pairs", type=int, default=750, help="pairs of sentences for STS")
    parser.add_argument("--num_held_out", type=int, default=50, help="random shapes that the predictor is tested on")
    parser.add_argument("--num_task_shapes", type=int, default=NUM_RANDOM, help="shapes of question 6 with scores")
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens that each shape is trained on alone")
    parser.add_argument("--calibration_tokens", type=int, default=10_000, help="tokens that each shape is refitted on")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a sequence in that training")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences of a step in that training")
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "bf16"), help="precision of that training")
    return parser.parse_args()


class Study:
    """The supernet and its search, what is measured with, and the rows that are measured so far.

    Args:
        args: What `parse_arguments` returns.

    Raises:
        ValueError: If rows were measured with other settings, or the search on another text than is expected.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.seeds = args, args.seeds or SEEDS
        self.search = args.search or Path(args.supernet) / "search"
        self.device = start_accelerator(mixed_precision=args.mixed_precision).device
        attention = "eager" if self.device.type == "cpu" and args.mixed_precision == "bf16" else "sdpa"
        self.supernet = SuperShaperModel.from_pretrained(
            args.supernet, dtype=torch.float32, attn_implementation=attention
        ).to(self.device)
        self.original = AutoModel.from_pretrained(args.bert).eval().to(self.device)
        self.tokenizer, self.pooling = AutoTokenizer.from_pretrained(args.bert), read_pooling(args.bert) or "mean"
        self.space = SearchSpace.from_model(self.supernet)
        self.predictor = ShapePredictor.load(self.search / PREDICTOR_FILE)
        settings = {name: value for name, value in vars(args).items() if name not in PATHS}
        fitted = 0 if self.predictor.evidence is None else len(self.predictor.evidence.losses)
        settings |= {
            "recipe": RECIPE,
            "rates": RATES,
            "weights": fingerprint_encoder(self.supernet),
            "fitted_on": fitted,
        }
        self.results = Results(args.results, QUESTION, settings)

    @cached_property
    def searched(self) -> Contents:
        """The records of the search."""
        return parse(self.search / RECORDS_FILE)

    @cached_property
    def sequences(self) -> Dataset:
        """The held-out text. The search has used its first sequences."""
        return tokenize(load_text(held_out_text(self.args.data)), self.tokenizer, self.args.search_max_length)

    @cached_property
    def text_of_search(self) -> list[dict[str, torch.Tensor]]:
        """The text that the search has measured on, checked by its fingerprint."""
        header = self.searched.header
        used = self.sequences.select(range(header["sequences"]))
        batches = fixed_masks(used, self.tokenizer, self.args.search_batch_size, mlm_probability=0)
        if fingerprint_data(batches) != header["data"]:
            raise ValueError(
                f"{self.search / RECORDS_FILE} was not measured on the first {header['sequences']} sequences of "
                f"{held_out_text(self.args.data)}, in batches of {self.args.search_batch_size} sequences of at most "
                f"{self.args.search_max_length} tokens. Give the options of the search: --search_max_length, "
                "--search_batch_size."
            )
        return batches

    @cached_property
    def other_sequences(self) -> Dataset:
        """Held-out text that the search did not use."""
        used = self.searched.header["sequences"]
        rest = self.sequences.select(range(used, len(self.sequences))).shuffle(seed=0)
        return rest.select(range(min(len(rest), self.args.max_eval_samples)))

    @cached_property
    def other_text(self) -> list[dict[str, torch.Tensor]]:
        """The same text in batches."""
        return fixed_masks(self.other_sequences, self.tokenizer, self.args.search_batch_size, mlm_probability=0)

    @cached_property
    def training_sequences(self) -> Dataset:
        """The text that the supernet was trained on, in shorter sequences."""
        return tokenize(load_text(training_text(self.args.data)), self.tokenizer, self.args.max_length)

    @cached_property
    def pairs(self) -> tuple[list[tuple[str, str]], np.ndarray]:
        """Pairs of sentences of the validation examples of stsb, and their similarity."""
        pairs, labels = load_pairs(task_file(self.args.data, "stsb", "validation"))
        chosen = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), self.args.num_pairs)).astype(int))
        return [pairs[index] for index in chosen], labels[chosen]

    def sts(self, model: Any, shape: Sequence[int] | None = None) -> float:
        """Return the STS of a model, see `sentence_similarity.py`."""
        return similarity_score(model, self.tokenizer, *self.pairs, self.pooling, shape)

    def distances(
        self, shapes: Sequence[list[int]], batches: list[dict[str, torch.Tensor]], name: str, layers: str
    ) -> list[Record]:
        """Return distance and cosine of shapes of the supernet. A file of records keeps them if the script is stopped.

        Its name holds the fingerprint of the weights, because another supernet needs another file.
        """
        file = self.args.output_dir / QUESTION / f"{name}-{layers}-{self.results.settings['weights'][:16]}.jsonl"
        options: dict[str, Any] = {"measure": "distance", "original": self.original, "layers": layers}
        options["records_file"] = file
        return evaluate_shapes(self.supernet, batches, shapes, f"Measuring {name}", **options)


# What is compared


def ways_to_a_shape(study: Study, max_parameters: int) -> dict[str, Callable[[], Shape]]:
    """Return functions, by the name of the shape that they find for a budget."""
    space, predictor = study.space, study.predictor

    def evolve() -> Shape:
        return evolutionary_search(space, predictor, {"parameters": max_parameters}).shape

    return {
        SEARCHED: partial(pareto_front(space, predictor).best, max_parameters),
        MEASURED: partial(measure_a_round, study, max_parameters),
        EVOLUTIONARY: evolve,
        HEURISTIC: partial(derive_profile(space, predictor).shape, space, max_parameters),
        **{name: partial(hand_crafted, space, name, max_parameters) for name in HAND_CRAFTED},
    }


def measure_a_round(study: Study, max_parameters: int) -> Shape:
    """Return the best shape for a budget after one more round of the search, as `measure_in_rounds` has them.

    The front's shape is predicted to be the best. Here the shapes that may be the best are measured, on the text of the
    search, and the best one counts.
    """
    records = study.searched.records
    known = {tuple(record["shape"]) for record in records}
    proposed = propose_shapes(study.space, study.predictor, ROUND, known, 0, max_cost=max_parameters)
    layers = study.searched.header["layers"]
    found = study.distances(proposed, study.text_of_search, f"round-{max_parameters}", layers)
    return best_measured(study.space, [*records, *found], "parameters", max_parameters)


def compared_shapes(study: Study) -> None:
    """Add a row for each name and budget: which shape it is."""
    bert = study.original
    for share in BUDGET_SHARES:
        for name, find in ways_to_a_shape(study, budget(bert.config, share, bert.num_parameters())).items():
            if not study.results.find(kind="shape", share=share, name=name):
                shape = find()
                predicted = study.predictor.predict(shape) if study.predictor.knows(shape) else None
                row = {"shape": shape, "parameters": study.space.num_parameters(shape), "predicted": predicted}
                study.results.add({"kind": "shape", "share": share, "name": name, **row})


def measure_predictor(study: Study) -> None:
    """Add a row for each random shape that the search has not measured.

    Raises:
        ValueError: If a shape of the search has another distance now: it was a search of another supernet.
    """
    known = study.searched.records[0]
    searched = {tuple(record["shape"]) for record in study.searched.records}
    drawn = study.space.sample(2 * study.args.num_held_out + len(searched), seed=HELD_OUT_SEED).tolist()
    new = [list(shape) for shape in dict.fromkeys(map(tuple, drawn)) if shape not in searched]
    new = [shape for shape in new[: study.args.num_held_out] if not study.results.find(kind="held_out", shape=shape)]
    if not new:
        return
    layers = study.searched.header["layers"]
    again, *records = study.distances([known["shape"], *new], study.text_of_search, "held_out", layers)
    if abs(again["distance"] - known["distance"]) > TOLERANCE:
        raise ValueError(
            f"{study.search / RECORDS_FILE} gives {known['shape']} the distance {known['distance']:.3f}, but in "
            f"--supernet {study.args.supernet} it has {again['distance']:.3f}. Give the search of this supernet."
        )
    for record in records:
        predicted = study.predictor.predict(record["shape"])
        study.results.add({"kind": "held_out", **record, "predicted": predicted})


def measure_inherited(study: Study) -> None:
    """Add a row for the original, for each shape that is compared, and for those of question 6, which have no STS."""
    if not study.results.find(kind="original"):
        parameters = study.original.num_parameters()
        study.results.add({"kind": "original", "parameters": parameters, "sts": study.sts(study.original)})
    compared = [row["shape"] for row in study.results.find(kind="shape")]
    others = random_shapes(study.space, study.args.num_task_shapes)
    wanted = dict.fromkeys(map(tuple, [*compared, *others]))
    missing = [list(shape) for shape in wanted if not study.results.find(kind="inherited", shape=list(shape))]
    if not missing:
        return
    records = study.distances(missing, study.other_text, "inherited", "last")
    in_all_layers = study.distances(missing, study.other_text, "inherited", "all")
    for record, other in zip(records, in_all_layers, strict=True):
        shape, record = record["shape"], {**record, ALL_LAYERS: other["distance"]}
        sts = {"sts": study.sts(study.supernet, shape)} if shape in compared else {}
        study.results.add({"kind": "inherited", "parameters": study.space.num_parameters(shape), **record, **sts})


def measure_parts(study: Study) -> None:
    """Add a row for each shape that is compared: its distances on parts of the text, its STS on parts of the pairs.

    The error of a difference between two shapes follows from its spread over the parts.
    """
    shapes = dict.fromkeys(tuple(row["shape"]) for row in study.results.find(kind="shape"))
    missing = [list(shape) for shape in shapes if not study.results.find(kind=PARTS, shape=list(shape))]
    if not missing:
        return
    sequences, (pairs, labels) = study.other_sequences, study.pairs
    found: list[Row] = [{"shape": shape, ALL_LAYERS: [], DISTANCE: [], STS: []} for shape in missing]
    for first in range(NUM_PARTS):
        part = sequences.select(range(first, len(sequences), NUM_PARTS))
        text = fixed_masks(part, study.tokenizer, study.args.search_batch_size, mlm_probability=0)
        for figure, layers in ((ALL_LAYERS, "all"), (DISTANCE, "last")):
            options: dict[str, Any] = {"measure": "distance", "original": study.original, "layers": layers}
            for row, record in zip(found, evaluate_shapes(study.supernet, text, missing, **options), strict=True):
                row[figure].append(record["distance"])
        for row in found:
            rated = pairs[first::NUM_PARTS], labels[first::NUM_PARTS]
            row[STS].append(similarity_score(study.supernet, study.tokenizer, *rated, study.pooling, row["shape"]))
    for row in found:
        study.results.add({"kind": PARTS, **row})


def predict_heuristic(study: Study) -> None:
    """Add a row for each of many budgets: the predicted distance of the front's shape and of the heuristic's."""
    space, predictor, bert = study.space, study.predictor, study.original
    front, profile = pareto_front(space, predictor), derive_profile(space, predictor)
    for share in PREDICTED_SHARES:
        if not study.results.find(kind=BUDGETS, share=share):
            most = budget(bert.config, share, bert.num_parameters())
            shapes = {SEARCHED: front.best(most), HEURISTIC: profile.shape(space, most)}
            predicted = {name: predictor.predict(shape) for name, shape in shapes.items()}
            study.results.add({"kind": BUDGETS, "share": share, **predicted})


# Training alone


def rates_of(shape: Shape) -> tuple[float, ...]:
    """Return the learning rates that a shape is trained with."""
    return RATES if 0 in shape else RATES[:1]


def training_arguments(study: Study, rate: float, seed: int) -> SuperPretrainingArguments:
    """Return the options of a run with about `--tokens` tokens."""
    args = study.args
    in_a_step = args.batch_size * float(count_tokens(study.training_sequences).mean())
    return SuperPretrainingArguments(
        **RECIPE,
        learning_rate=rate,
        max_steps=max(1, round(args.tokens / in_a_step)),
        max_length=args.max_length,
        per_device_train_batch_size=args.batch_size,
        pooling=study.pooling,
        mixed_precision=args.mixed_precision,
        seed=seed,
    )


def train_alone(study: Study, shape: Shape, rate: float, seed: int) -> None:
    """Cut a shape out of the supernet, refit and train it, and add a row with what it is then.

    Raises:
        SystemExit: If the training was interrupted. The same command starts it again.
    """
    began, subnet = time.perf_counter(), study.supernet.extract_subnet(shape)
    text, size = study.training_sequences, study.args.batch_size
    batches = calibration_batches(text, study.tokenizer, study.args.calibration_tokens, size, seed)
    polish(subnet, study.supernet, shape, batches, study.original)
    options, teacher = training_arguments(study, rate, seed), OutsideTeacher(study.original)
    summary = super_pretrain(
        subnet, study.tokenizer, text, options, teacher=teacher, description=f"{shape}, seed {seed}"
    )
    if summary.status == "interrupted":
        raise SystemExit("Interrupted. Start the same command again.")
    seconds = time.perf_counter() - began
    (record,) = evaluate_shapes(subnet, study.other_text, [None], measure="distance", original=study.original)
    figures = {"distance": record["distance"], "cosine": record["cosine"], "sts": study.sts(subnet)}
    counts = {"tokens": summary.progress.tokens, "steps": summary.progress.step, "seconds": round(seconds, 1)}
    key = {"kind": "trained", "shape": shape, "rate": rate, "seed": seed}
    study.results.add({**key, **counts, **figures})


def train_all(study: Study) -> None:
    """Train every shape that is compared with the first seed, and those of `REPEATED` with all."""
    for seed in study.seeds:
        for row in study.results.find(kind="shape"):
            if seed != study.seeds[0] and (row["share"], row["name"]) not in REPEATED:
                continue
            for rate in rates_of(row["shape"]):
                if not study.results.find(kind="trained", shape=row["shape"], rate=rate, seed=seed):
                    train_alone(study, row["shape"], rate, seed)


def main() -> None:
    args = parse_arguments()
    study = Study(args)
    compared_shapes(study)
    measure_predictor(study)
    measure_inherited(study)
    measure_parts(study)
    predict_heuristic(study)
    train_all(study)
    pictures = args.output_dir / QUESTION
    pictures.mkdir(parents=True, exist_ok=True)
    print(answer(args.results, pictures))


if __name__ == "__main__":
    main()
