"""Folders of a search with made-up measurements: what `examples/search_shapes.py` leaves, without any model."""

import math

import numpy as np
from conftest import tiny_config

from supershaper_hf import LatencyTable, SearchSpace, ShapePredictor
from supershaper_hf.report.findings import CONFIG_FILE, LATENCY_FILE, PREDICTOR_FILE, RECORDS_FILE
from supershaper_hf.search.records import append_record, open_records


HEADS = {"loss": "MaskedLM", "distance": "Model", "task_loss": "SequenceClassification"}


def made_up_record(measure, shape, value):
    good = 1 / (1 + value) if math.isfinite(value) else 0.0
    others = {
        "loss": {"perplexity": math.exp(value), "accuracy": good},
        "distance": {"cosine": good},
        "task_loss": {"score": good},
    }
    return {"shape": shape, measure: value, **others[measure]}


def made_up_search(folder, measure="loss", latency=False, layers=3, drop_rate=0.0, more=()):
    """Write a search over some shapes: narrower layers are worse, the first one most.

    Args:
        folder: The folder, which must not exist.
        measure: What was "measured".
        latency: Whether a latency table is measured (of a tiny model, a second).
        layers: Number of layers.
        drop_rate: How likely each layer is dropped.
        more: Pairs of a shape and a value, measured besides; the predictor has not seen them.
    """
    folder.mkdir()
    head = HEADS[measure]
    architecture = "SuperShaperModel" if head == "Model" else f"SuperShaperFor{head}"
    config = tiny_config(num_hidden_layers=layers, architectures=[architecture])
    space, random = SearchSpace.from_config(config), np.random.default_rng(0)
    shapes = np.unique(
        np.vstack([space.sample(40, seed=0, drop_rate=drop_rate), [[8] * layers], [[48] * layers]]), axis=0
    )[:30]
    values = (48 - shapes) @ np.linspace(0.8, 0.3, layers) / (48 * layers) + 0.2 + random.normal(0, 0.01, len(shapes))
    header = {"measure": measure, "model": "m", "data": "d", "precision": "no", "num_layers": layers}
    header |= {"width_choices": space.width_choices, "hidden_sizes": config.hidden_sizes}
    header |= {"original": "o" if measure == "distance" else None, "score": "f1" if measure == "task_loss" else None}
    open_records(folder / RECORDS_FILE, header)
    records = [made_up_record(measure, shape, value) for shape, value in zip(shapes.tolist(), values.tolist())]
    for record in [*records, *(made_up_record(measure, *pair) for pair in more)]:
        append_record(folder / RECORDS_FILE, record)
    ShapePredictor.fit_records(records).save(folder / PREDICTOR_FILE)
    config.to_json_file(folder / CONFIG_FILE)
    if latency:
        LatencyTable.measure(space, sequence_length=8, repeats=2, warmup=1).save(folder / LATENCY_FILE)
    return folder
