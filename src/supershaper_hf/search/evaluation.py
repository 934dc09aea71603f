"""Measure what many shapes of one supernet are worth: masked-LM loss on the same masked text for all.

A record depends on the model, the text and the shape alone: not on the other shapes, on kills, or on the number of
processes. (Bit for bit as far as one batch's forward pass does not: on the same device, with as many threads.)
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperForMaskedLM
from ..processes import on_main_process
from .records import Batch, Header, Record, append_record, make_header, open_records, perplexity


@torch.no_grad()
def evaluate_shapes(
    model: SuperShaperForMaskedLM,
    batches: Sequence[Batch],
    shapes: Sequence[Sequence[int] | None],
    description: str = "Measuring shapes",
    accelerator: Accelerator | None = None,
    records_file: str | Path | None = None,
) -> list[Record]:
    """Measure each shape on every labelled token of `batches`.

    With `records_file` every record is written as soon as it is measured. The same call goes on after a kill, which
    costs at most the shape that was being measured; more shapes can be asked for later.

    Args:
        model: A supernet, or a subnet with `shapes=[None]`. Its training mode is left as it was.
        batches: Masked batches from `batches.fixed_masks`.
        shapes: Shapes to measure; `None` is the model's own full shape. One that occurs twice is measured once.
        description: Label of the progress bar.
        accelerator: If given, its processes share the batches, and each returns the same records; they are computed
            in its mixed precision.
        records_file: JSON lines to add to, see `records`; by default none is written. With several processes only the
            main one reads and writes it. Only one run at a time may use it.

    Returns:
        One record per shape, in the order asked for: `shape`, `loss` in nats per labelled token, `perplexity` (infinite
        where it overflows), `accuracy` (share of labelled tokens predicted exactly).

    Raises:
        ValueError: If no token is labelled, a shape is not allowed, processes ask for different ones, or
            `records_file` was begun by another model, on other data, in another precision, or has no header.
        OSError: If `records_file` cannot be read or written. What it holds is kept.

    Example:
        >>> shapes = SearchSpace(supernet.config).sample(1000, seed=0)  # doctest: +SKIP
        >>> records = evaluate_shapes(supernet, batches, shapes, records_file="records.jsonl")  # doctest: +SKIP
    """
    check_same_shapes(shapes, accelerator)
    batches = [batch for batch in batches if (batch["labels"] != IGNORE_INDEX).any()]
    if not batches:
        raise ValueError("No token of the batches is labelled. Use more text, or a higher masking rate.")
    config = model.config
    own: Sequence[int] = config.hidden_sizes or []  # never None in a model
    asked = [tuple(own if shape is None else config.normalize_shape(shape)) for shape in shapes]
    distinct = dict(zip(asked, shapes, strict=True))
    evaluation = Evaluation(model, batches, accelerator)
    known: dict[tuple[int, ...], Record] = {}
    with evaluation_mode(model):
        if records_file is not None:
            header = make_header(model, batches, evaluation.precision())
            known = {tuple(record["shape"]): record for record in recorded(records_file, header, accelerator)}
        missing = [shape for shape in distinct if shape not in known]
        bar = tqdm(
            missing,
            desc=description,
            total=len(distinct),
            initial=len(distinct) - len(missing),
            disable=len(missing) < 2 or (accelerator is not None and not accelerator.is_main_process),
            leave=accelerator is None,
        )
        for shape in bar:
            known[shape] = record = {"shape": list(shape), **evaluation.measure(distinct[shape])}
            if records_file is not None:
                on_main_process(partial(append_record, records_file, record), accelerator)
    return [copy.deepcopy(known[shape]) for shape in asked]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off, and leave the model in the mode it was in, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Evaluation:
    """This process's share of the batches on its device, and the measuring of one shape on all of them."""

    def __init__(
        self, model: SuperShaperForMaskedLM, batches: Sequence[Batch], accelerator: Accelerator | None
    ) -> None:
        self.model, self.accelerator = model, accelerator
        self.labelled = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches]
        self.processes = 1 if accelerator is None else accelerator.num_processes
        rank = 0 if accelerator is None else accelerator.process_index
        # Under FSDP every forward pass takes all processes: one without a batch left runs the last batch for nothing.
        rounds = math.ceil(len(batches) / self.processes)
        share = [batches[min(i, len(batches) - 1)] for i in range(rank, rounds * self.processes, self.processes)]
        self.share = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in share]

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()

    def precision(self) -> str:
        """Return the dtype that autocast computes in, "no" without it.

        It is seen from inside a forward pass of one sequence, since a model from `Accelerator.prepare` brings its own.
        """
        kind, seen = self.model.device.type, []

        def look(*_: Any) -> None:
            enabled = torch.is_autocast_enabled(kind)
            seen.append(str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if enabled else "no")

        inputs = {name: tensor[:1] for name, tensor in self.share[0].items() if name != "labels"}
        with self.model.get_input_embeddings().register_forward_pre_hook(look), self.autocast():
            self.model(**inputs)
        return seen[0]

    def measure(self, shape: Sequence[int] | None) -> dict[str, float]:
        """Return `loss`, `perplexity` and `accuracy` of a shape, the same on every process.

        What is gathered are the figures of each batch, and `fsum` rounds once, after adding: so the result does not
        depend on which process had which batch.
        """
        # They stay on the device until the last batch: reading each would let a GPU wait for the next.
        with self.autocast():
            figures = torch.stack([measure_batch(self.model, batch, shape) for batch in self.share])
        if self.accelerator is not None:
            figures = self.accelerator.gather(figures.to(self.accelerator.device))
        # From (process, round) to the order of the batches; the last round may hold copies of the last batch.
        figures = figures.view(self.processes, -1, 2).transpose(0, 1).reshape(-1, 2)[: len(self.labelled)]
        means, correct = figures.T.tolist()
        tokens = sum(self.labelled)
        loss = math.fsum(mean * count for mean, count in zip(means, self.labelled, strict=True)) / tokens
        return {"loss": loss, "perplexity": perplexity(loss), "accuracy": math.fsum(correct) / tokens}


def measure_batch(model: SuperShaperForMaskedLM, batch: Batch, shape: Sequence[int] | None) -> torch.Tensor:
    """Return a batch's loss in nats per label and its number of right predictions: float32, on the model's device."""
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
    output: Any = model(**batch, shape=shape, sparse_prediction=True)
    return torch.stack([output.loss.float(), (output.logits.argmax(-1) == labels).sum().float()])


# Where several processes measure


def check_same_shapes(shapes: Sequence[Sequence[int] | None], accelerator: Accelerator | None) -> None:
    """Raise on every process if they ask for different shapes: each would measure its own on its share of the text."""
    if accelerator is None or accelerator.num_processes == 1:
        return
    asked = gather_object([[None if shape is None else tuple(shape) for shape in shapes]])
    strangers = [rank for rank, other in enumerate(asked) if other != asked[0]]
    if strangers:
        raise ValueError(
            f"Processes {strangers} ask for other shapes than process 0, so they cannot share the measuring. Draw the "
            "shapes from the same seed on each."
        )


def recorded(file: str | Path, header: Header, accelerator: Accelerator | None) -> list[Record]:
    """Begin or go on with a records file; return the records in it, the same on every process."""
    headers = [header] if accelerator is None else gather_object([header])

    def begin() -> list[Record]:
        strangers = [rank for rank, other in enumerate(headers) if other != header]
        if strangers:
            raise ValueError(
                f"Processes {strangers} have other weights or batches than process 0, so they cannot share the "
                "measuring. Load the same model and draw the same masks on each."
            )
        return open_records(file, header)

    return on_main_process(begin, accelerator)
