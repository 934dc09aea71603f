"""What a search has found out: the files of its folder, read and compared with each other.

`examples/search_shapes.py` writes the files: `config.json` of the supernet, `records.jsonl` with the measured shapes,
`predictor.json`, and, where they were asked for, `latency.json` and `insensitivity.json`. `page` shows what is in them.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..latency.insensitivity import Insensitivity, load_comparisons
from ..latency.table import LatencyTable
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.costs import Cost, chain_cost
from ..model.shapes import SearchSpace
from ..search.measures import MEASURES, Measure, measure_of
from ..search.pareto import ParetoFront, pareto_front
from ..search.predictor import ShapePredictor
from ..search.records import Record, parse, read_records
from ..search.rounds import best_measured


CONFIG_FILE, RECORDS_FILE, PREDICTOR_FILE = "config.json", "records.jsonl", "predictor.json"
LATENCY_FILE, INSENSITIVITY_FILE = "latency.json", "insensitivity.json"


def write_config(folder: str | Path, space: SearchSpace) -> None:
    """Write the configuration of a supernet into the folder of a search. It names the class whose subnets are counted.

    Example:
        >>> write_config("outputs/search", SearchSpace.from_model(supernet))  # doctest: +SKIP
    """
    config = copy.deepcopy(space.config)
    config.architectures = [space.model_class.__name__]
    config.to_json_file(Path(folder) / CONFIG_FILE)


@dataclass(frozen=True)
class Findings:
    """The files of a search.

    Attributes:
        space: The search space.
        records: The records of all measured shapes.
        predictor: A predictor that was fitted on all or some of these records.
        table: The latency table, if latency was measured.
        comparisons: The comparisons of shapes of equal size, if they were made.
        sequence_length: Tokens per sequence, for FLOPs and latency.
        score: The name of the score in the records of losses on a task, if it has one.
        layers: Which layers' distance was measured, "last" or "all"; `None` for other measures.
    """

    space: SearchSpace
    records: list[Record]
    predictor: ShapePredictor
    table: LatencyTable | None
    comparisons: list[Insensitivity]
    sequence_length: int
    score: str | None = None
    layers: str | None = None

    @classmethod
    def read(cls, folder: str | Path, sequence_length: int = 128) -> "Findings":
        """Read the files of a search.

        Args:
            folder: The output folder of `examples/search_shapes.py`.
            sequence_length: Tokens per sequence, to count FLOPs. If latency was measured, the length of that
                measurement is used instead. Otherwise it is at most the longest input of the model.

        Raises:
            FileNotFoundError: If a file that is needed is missing.
            ValueError: If a file is damaged, or the files do not belong together.

        Example:
            >>> findings = Findings.read("outputs/search")  # doctest: +SKIP
            >>> findings.front("parameters").best(max_cost=63_000_000)  # doctest: +SKIP
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, RECORDS_FILE, PREDICTOR_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}. Make the folder with examples/search_shapes.py.")
        config = SuperShaperConfig.from_pretrained(folder)
        space = SearchSpace.from_config(config, *(config.architectures or []))
        table = LatencyTable.load(folder / LATENCY_FILE) if (folder / LATENCY_FILE).exists() else None
        file, header = folder / INSENSITIVITY_FILE, parse(folder / RECORDS_FILE).header
        findings = cls(
            space=space,
            records=read_records(folder / RECORDS_FILE),
            predictor=ShapePredictor.load(folder / PREDICTOR_FILE),
            table=table,
            comparisons=load_comparisons(file) if file.exists() else [],
            sequence_length=min(sequence_length, space.config.max_position_embeddings)
            if table is None
            else table.sequence_length,
            score=header["score"],
            layers=header["layers"],
        )
        findings._check_that_files_belong_together(folder)
        return findings

    def _check_that_files_belong_together(self, folder: Path) -> None:
        compared = [shape for comparison in self.comparisons for shape in comparison.shapes]
        measured_shapes = [record["shape"] for record in self.records]
        for name, shapes in ((RECORDS_FILE, measured_shapes), (INSENSITIVITY_FILE, compared)):
            try:
                for shape in shapes:
                    self.space.validate(shape)
            except ValueError as error:
                raise ValueError(
                    f"{folder / name} holds shapes of another supernet than {folder / CONFIG_FILE}: {error}"
                ) from None
        if self.predictor.evidence is None:
            raise ValueError(
                f"{folder / PREDICTOR_FILE} was not fitted on measured shapes. Use ShapePredictor.fit_records."
            )
        if self.records and measure_of(self.records) != self.measure:
            raise ValueError(
                f"{folder / PREDICTOR_FILE} predicts {self.measure.plural}, but {folder / RECORDS_FILE} holds "
                f"{measure_of(self.records).plural}. Fit it on these with ShapePredictor.fit_records."
            )
        measured = {tuple(record["shape"]): record[self.measure.name] for record in self.records}
        fitted = dict(zip(map(tuple, self.predictor.evidence.shapes.tolist()), self.predictor.evidence.losses.tolist()))
        others = [shape for shape, loss in fitted.items() if shape in measured and measured[shape] != loss]
        if others or not fitted.keys() & measured.keys():
            reason = (
                f"{len(others)} of its {len(fitted)} shapes have another {self.measure.name}"
                if others
                else "no shape is the same"
            )
            raise ValueError(
                f"{folder / PREDICTOR_FILE} was fitted on other measurements than those in {folder / RECORDS_FILE}: "
                f"{reason}. Fit it on these with ShapePredictor.fit_records, or put the right files together."
            )

    @property
    def measure(self) -> Measure:
        """What was measured and is predicted."""
        return MEASURES[self.predictor.measure]

    @property
    def explanation(self) -> str:
        """What the measured values are, in a sentence; nothing for a measure that needs none."""
        if self.layers is None:
            return ""
        of = {"last": "of the last layer", "all": "the mean of all layers"}[self.layers]
        return (
            f"The distance is the squared error of the hidden states, {of}, relative to their variance: 0 for those of "
            "the original, 1 for the same guess for every token."
        )

    def num_possible(self) -> int:
        """Return the number of shapes that could be measured: with dropped layers if some shape drops one."""
        if any(0 in record["shape"] for record in self.records):
            return (len(self.space.width_choices) + 1) ** self.space.num_layers - 1
        return self.space.size

    def missing(self) -> int:
        """Return the number of shapes that the predictor was fitted on, but whose records are not there."""
        measured = {tuple(record["shape"]) for record in self.records}
        return len(self._fitted() - measured)

    def held_out(self) -> list[Record]:
        """Return the records of shapes that the predictor was not fitted on, but can predict."""
        fitted = self._fitted()
        new = [record for record in self.records if tuple(record["shape"]) not in fitted]
        return [record for record in new if self.predictor.knows(record["shape"])]

    def _fitted(self) -> set[tuple[int, ...]]:
        evidence = self.predictor.evidence
        return set() if evidence is None else set(map(tuple, evidence.shapes.tolist()))

    def front(self, cost: str) -> ParetoFront:
        """Return the Pareto front of `"parameters"`, `"flops"` or, where there is a table, `"latency"`."""
        return pareto_front(self.space, self.predictor, self._cost(cost), self.sequence_length)

    def costs(self, shapes: Sequence[Sequence[int]], cost: str) -> np.ndarray:
        """Return the costs (n,) of `shapes` (n, layers)."""
        terms = self.space.terms(self._cost(cost), self.sequence_length)
        return chain_cost(terms, self.space.config.hidden_size, np.array(shapes))

    def best_measured(self, cost: str, max_cost: float) -> list[int]:
        """Return the measured shape with the lowest loss or distance that costs at most `max_cost`."""
        return best_measured(self.space, self.records, self._cost(cost), max_cost, self.sequence_length)

    def rows(self, shapes: np.ndarray) -> list[dict[str, Any]]:
        """Return costs, prediction and measurement of each of `shapes` (n, layers).

        Predictions are `predicted_loss`, `predicted_deviation` and `predicted_perplexity`, and the measurement is
        `measured_perplexity`. For distances, they are `predicted_distance`, `predicted_deviation` and
        `measured_distance`. Unknown values are None: the prediction of a shape that the predictor does not know, the
        measurement of a shape without a record, and the latency if there is no table.
        """
        measure = self.measure
        measured = {tuple(record["shape"]): record[measure.shown] for record in self.records}
        known = np.array([self.predictor.knows(shape) for shape in shapes.tolist()])
        losses, deviations = np.zeros(len(shapes)), np.zeros(len(shapes))
        losses[known], deviations[known] = (
            self.predictor.predict(shapes[known]),
            self.predictor.uncertainty(shapes[known]),
        )
        return [
            {
                "shape": shape,
                "parameters": self.space.num_parameters(shape),
                "flops": self.space.flops(shape, self.sequence_length),
                "latency": None if self.table is None else self.table.predict(shape),
                f"predicted_{measure.name}": float(loss) if predicted else None,
                "predicted_deviation": float(deviation) if predicted else None,
                f"predicted_{measure.shown}": measure.show(float(loss)) if predicted else None,
                f"measured_{measure.shown}": measured.get(tuple(shape)),
            }
            for shape, predicted, loss, deviation in zip(shapes.tolist(), known, losses, deviations)
        ]

    def _cost(self, cost: str) -> Cost:
        if cost != "latency":
            return cost
        if self.table is None:
            raise ValueError(f"cost='latency' needs {LATENCY_FILE}. Measure it with search_shapes.py --latency DEVICE.")
        return self.table
