"""The folder of a search over shapes of a tiny supernet, whose measurements are made up."""

import math

import numpy as np
from conftest import tiny_model

from supershaper_hf import LatencyTable, SearchSpace, ShapePredictor
from supershaper_hf.report.findings import LATENCY_FILE, PREDICTOR_FILE, RECORDS_FILE, write_config
from supershaper_hf.report.page import write_report
from supershaper_hf.search.fingerprints import fingerprint_encoder, fingerprint_model
from supershaper_hf.search.measures import measure_of
from supershaper_hf.search.records import append_record, open_records, read_records


def made_up_loss(shape):
    return 5 - sum(math.log(width or 1) * weight for width, weight in zip(shape, (0.5, 0.2, 0.1)))


def loss_record(shape):
    loss = made_up_loss(shape)
    return {"shape": shape, "loss": loss, "perplexity": math.exp(loss), "accuracy": 0.25}


def distance_record(shape):
    return {"shape": shape, "distance": made_up_loss(shape) / 5, "cosine": 0.5}


def write_search(folder, model=None, record=loss_record, latency=False):
    """Write the folder of a search over 24 shapes of `model`, with its report; return it."""
    model = tiny_model() if model is None else model
    config, space = model.config, SearchSpace.from_model(model)
    measure = measure_of([record([8] * space.num_layers)]).name
    fingerprint = fingerprint_encoder if measure == "distance" else fingerprint_model
    header = {
        "model": fingerprint(model),
        "data": "text",
        "precision": "float32",
        "measure": measure,
        "original": "original" if measure == "distance" else None,
        "score": None,
        "num_layers": space.num_layers,
        "width_choices": config.width_choices,
        "hidden_sizes": config.hidden_sizes,
    }
    open_records(folder / RECORDS_FILE, header)
    shapes = np.unique(np.vstack([space.sample(30, seed=0), [space.smallest], [space.largest]]), axis=0)
    for shape in [*shapes[:23].tolist(), space.largest]:
        append_record(folder / RECORDS_FILE, record(shape))
    ShapePredictor.fit_records(read_records(folder / RECORDS_FILE)).save(folder / PREDICTOR_FILE)
    write_config(folder, space)
    if latency:
        LatencyTable.measure(space, sequence_length=8, repeats=2, warmup=1).save(folder / LATENCY_FILE)
    write_report(folder, sequence_length=12)
    return folder
