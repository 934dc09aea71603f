"""Measure many shapes of one supernet on the same text: masked-LM loss, distance to the original, or loss on a task.

A record depends only on the model, the text and the shape. It does not depend on the other shapes, on interruptions, or
on the number of processes. On the same device and with the same number of threads it is the same bit for bit.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checks import check_choice
from ..devices import copy_mapped_weights
from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperPreTrainedModel
from ..processes import on_every_process, on_main_process
from .distance import KEPT_BYTES, LAYERS, Original, check_layers, check_original, encode, has_masked_lm_head
from .fingerprints import fingerprint_data, fingerprint_encoder, fingerprint_model
from .measures import find_measure
from .records import Header, Record, append_record, hold_records, open_records, perplexity
from .task_loss import Score, check_task_head, compute_score, count_labels, score_name, task_losses


COUNTED = {"loss": "labelled_tokens", "distance": "tokens", "task_loss": "labels"}  # what a header counts
NOTHING = {  # why nothing can be measured
    "loss": "No token of the batches is labelled. Use more text, or a higher mlm_probability.",
    "distance": "The batches have no token that is not padding. Use more text.",
    "task_loss": "The batches have no label but -100. Use examples with labels.",
}

Batch = dict[str, torch.Tensor]
Key = tuple[int, ...]  # a shape
Compute = Callable[[], torch.Tensor]


@overload
def evaluate_shapes(
    model: SuperShaperPreTrainedModel,
    batches: Sequence[Batch],
    shapes: Sequence[int],
    description: str = ...,
    accelerator: Accelerator | None = ...,
    records_file: str | Path | None = ...,
    measure: str = ...,
    original: PreTrainedModel | None = ...,
    score: Score | None = ...,
    layers: str = ...,
) -> Record: ...
@overload
def evaluate_shapes(
    model: SuperShaperPreTrainedModel,
    batches: Sequence[Batch],
    shapes: Sequence[Sequence[int] | None] | np.ndarray,
    description: str = ...,
    accelerator: Accelerator | None = ...,
    records_file: str | Path | None = ...,
    measure: str = ...,
    original: PreTrainedModel | None = ...,
    score: Score | None = ...,
    layers: str = ...,
) -> list[Record]: ...
@torch.no_grad()
def evaluate_shapes(
    model: SuperShaperPreTrainedModel,
    batches: Sequence[Batch],
    shapes: Sequence[Any] | np.ndarray,
    description: str = "Measuring shapes",
    accelerator: Accelerator | None = None,
    records_file: str | Path | None = None,
    measure: str = "loss",
    original: PreTrainedModel | None = None,
    score: Score | None = None,
    layers: str = "last",
) -> Record | list[Record]:
    """Measure each shape on `batches`: its masked-LM loss, its distance to the original model, or its loss on a task.

    The loss is measured on every labelled token. The distance compares the hidden states of the encoder on every token
    that is not padding, so it needs neither labels nor a masked-LM head. See `distance` for its definition.
    The loss on a task is that of the head of a task on labelled examples, see `task_loss`.

    With `records_file`, every record is written as soon as it is measured. After a kill the same call continues: only
    the shape that was being measured is lost. More shapes can be measured into the same file later.

    Weights that are still mapped to their file are copied into memory first, see `devices.copy_mapped_weights`.

    Args:
        model: A supernet, or a subnet with `shapes=[None]`. Its mode, training or evaluation, stays. For the loss it
            has a masked-LM head; for the distance any head, or none; for a task the head of the task.
        batches: Batches from `fixed_masks`, masked for the loss, and with `mlm_probability=0` for the distance. The
            distance needs `input_ids` and `attention_mask`, and ignores `labels`. For a task, what a collator makes of
            its examples: the arguments of the model, labels included.
        shapes: Many shapes, or one. `None` in the list is the model's own full shape. A shape that occurs twice is
            measured once.
        description: Label of the progress bar.
        accelerator: Its processes share the batches, compute in its mixed precision, and all return the same records.
            An error on one process is raised on all of them. By default one process measures alone.
        records_file: A JSON lines file that records are added to, see `records`. By default none is written. Only
            one run at a time may use it, and only its main process reads and writes it.
        measure: What is measured, `"loss"`, `"distance"` or `"task_loss"`.
        original: For the distance, the model to compare with: the BERT that the supernet was made of, or another
            supernet, with or without a head. Its hidden size and its tokenizer are those of `model`. By default it is
            the largest shape of `model`.
        score: For a task, a function of the logits and the labels of all examples that returns one number. It gets
            arrays as `Trainer` gives them to `compute_metrics`. Its name is kept in `records_file`.
        layers: For the distance, whose states are compared: `"last"`, those of the last layer, which an encoder gives
            as it is; or `"all"`, the mean over all layers, which says more of a shape that will be fine-tuned. "all"
            needs a supernet, and an original with as many layers.

    Returns:
        One record per shape, in the order of `shapes`, or a single record for a single shape. A record is a dictionary.
        For the loss it has `shape`, `loss` (nats per labelled token), `perplexity` (infinity where it overflows) and
        `accuracy` (share of the labelled tokens that are predicted exactly). For the distance it has `shape`,
        `distance` (0 for the original, 1 for the same guess for every token) and `cosine` (of embeddings, 1 for the
        original). For a task it has `shape`, `task_loss` (mean over all labels) and `score` (None without a function,
        or where it is not finite).

    Raises:
        TypeError: If a shape is not a sequence of integers, or `original` is no model.
        ValueError: If no token is labelled, a shape is not allowed, the model has not the head of the measure, the
            sizes of `original` differ, the processes have different shapes, text or weights, or `records_file` was
            begun with another measure, model, original, score, layers or precision, or other data, or has no valid
            header.
        RuntimeError: If another run is using `records_file`.
        OSError: If `records_file` cannot be read or written. The records in it are kept.

    Example:
        >>> import torch
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
        >>> supernet = SuperShaperForMaskedLM(SuperShaperConfig(**sizes, vocab_size=50, width_choices=[4, 8]))
        >>> batch = {"input_ids": torch.tensor([[2, 7, 4, 3]]), "labels": torch.tensor([[-100, -100, 9, -100]])}
        >>> records = evaluate_shapes(supernet, [batch], [[8, 4], [4, 0]])
        >>> [record["shape"] for record in records]
        [[8, 4], [4, 0]]
        >>> batch["attention_mask"] = torch.ones(1, 4, dtype=torch.long)
        >>> evaluate_shapes(supernet, [batch], [8, 8], measure="distance")["distance"]
        0.0
    """
    find_measure(measure)
    single = _is_one_shape(shapes)
    many: list[Any] = [shapes] if single else list(shapes)

    def prepare() -> tuple[list[Key], Evaluation]:
        check_measurable(model, measure, original, score, layers)
        for each in (model,) if original is None else (model, original):
            copy_mapped_weights(each)
        return [_key(model, shape) for shape in many], Evaluation(
            model, batches, accelerator, measure, original, score, layers
        )

    asked, evaluation = on_every_process(prepare, accelerator)
    evaluation.check_same_call(asked)
    given = dict(zip(asked, many, strict=True))
    known: dict[Key, Record] = {}
    with evaluation_mode(model), evaluation_mode(model if original is None else original), ExitStack() as held:
        if records_file is not None:
            known = evaluation.continue_records(records_file, held)
        missing = [key for key in given if key not in known]
        bar = tqdm(
            missing,
            desc=description,
            total=len(given),
            initial=len(given) - len(missing),
            disable=len(missing) < 2 or (accelerator is not None and not accelerator.is_main_process),
            leave=accelerator is None,
        )
        for key in bar:
            known[key] = record = {"shape": list(key), **evaluation.measure(given[key])}
            if records_file is not None:
                on_main_process(partial(append_record, records_file, record), accelerator)
    records = [copy.deepcopy(known[key]) for key in asked]
    return records[0] if single else records


def _is_one_shape(shapes: Any) -> bool:
    """Return whether `shapes` is one shape rather than many. Text counts as one, so that it is refused as one."""
    if not hasattr(shapes, "__len__"):
        return True
    many = [each is None or (_has_items(each) and not isinstance(each, str)) for each in shapes]
    return len(many) > 0 and not any(many)


def _has_items(value: Any) -> bool:
    """Return whether `value` is a sequence. A width from a tensor has a method `__len__`, which raises an error."""
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def _key(model: SuperShaperPreTrainedModel, shape: Sequence[int] | None) -> Key:
    """Return the widths of a shape, or raise an error that says why the model cannot have it."""
    own: Sequence[int] = model.config.hidden_sizes or []  # a model always has them
    return tuple(own if shape is None else model.config.normalize_shape(shape))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off. Afterwards, also after an error, every module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Evaluation:
    """This process's share of the batches on its device, and how a shape is measured on all of them.

    Raises:
        ValueError: If no token of the batches is labelled or, for the distance, all of them are padding.
    """

    def __init__(
        self,
        model: SuperShaperPreTrainedModel,
        batches: Sequence[Batch],
        accelerator: Accelerator | None,
        measure: str = "loss",
        original: PreTrainedModel | None = None,
        score: Score | None = None,
        layers: str = "last",
    ) -> None:
        self.model, self.accelerator, self.kind, self.score = model, accelerator, measure, score
        self.layers = layers
        counted = [(batch, count_measured(batch, measure)) for batch in batches]
        self.batches = [batch for batch, count in counted if count > 0]
        self.counts = [count for _, count in counted if count > 0]
        if not self.batches:
            raise ValueError(NOTHING[measure])
        self.processes = 1 if accelerator is None else accelerator.num_processes
        rank = 0 if accelerator is None else accelerator.process_index
        # FSDP needs every process in every forward pass. A process that has no batch left repeats the last one, and
        # the result is not used.
        count = len(self.batches)
        rounds = math.ceil(count / self.processes)
        share = [self.batches[min(i, count - 1)] for i in range(rank, rounds * self.processes, self.processes)]
        self.share = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in share]
        self.original = (
            Original(model, original, self.share, layers, self.count_kept(rounds)) if measure == "distance" else None
        )

    def count_kept(self, rounds: int) -> int:
        """Return how many batches of each process have states of the original that are kept; see `Original`."""
        width = self.model.config.hidden_size * self.model.dtype.itemsize
        width *= self.model.config.num_hidden_layers if self.layers == "all" else 1
        ends = np.cumsum([batch["input_ids"].numel() * width for batch in self.batches])
        last = np.minimum(np.arange(1, rounds + 1) * self.processes, len(ends)) - 1  # the last batch of each round
        return int((ends[last] <= KEPT_BYTES).sum())

    def check_same_call(self, shapes: list[Key]) -> None:
        """Raise a ValueError on every process if they have different shapes or batches.

        They would add up losses of different shapes, or wait for each other for ever.
        """
        if self.processes > 1:
            self._agree(shapes, "ask for other shapes", "Draw the shapes from the same seed on each.")
            self._agree(fingerprint_data(self.batches), "have other batches", "Draw the same masks on each.")

    def _agree(self, value: Any, difference: str, advice: str) -> None:
        values = [value] if self.accelerator is None else gather_object([value])
        if strangers := [rank for rank, other in enumerate(values) if other != values[0]]:
            raise ValueError(
                f"Processes {strangers} {difference} than process 0, so they cannot share the measuring. {advice}"
            )

    def continue_records(self, file: str | Path, held: ExitStack) -> dict[Key, Record]:
        """Begin or continue a records file; return its records by shape, the same on every process.

        The main process keeps other runs away from the file until `held` is closed.
        """
        original = None if self.original is None else self.original.original

        def describe() -> Header:
            return make_header(self.model, self.batches, self.precision(), self.kind, original, self.score, self.layers)

        header = on_every_process(describe, self.accelerator)
        self._agree((header["model"], header["original"]), "have other weights", "Load the same models on each.")

        def begin() -> list[Record]:
            held.enter_context(hold_records(file))
            return open_records(file, header)

        return {tuple(record["shape"]): record for record in on_main_process(begin, self.accelerator)}

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()

    def precision(self) -> str:
        """Return the dtype in which autocast computes, such as "bfloat16", or "no" without autocast.

        A forward pass of one sequence shows it: a model from `Accelerator.prepare` brings its own autocast with it.
        """
        kind, seen = self.model.device.type, []

        def look(*_: Any) -> None:
            enabled = torch.is_autocast_enabled(kind)
            seen.append(str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if enabled else "no")

        first = {name: tensor[:1] for name, tensor in self.share[0].items()}
        with self.model.get_input_embeddings().register_forward_pre_hook(look), self.autocast():
            if self.kind == "task_loss":
                task_losses(self.model, [first], None)
            else:
                encode(self.model, first, None)
        return seen[0]

    def measure(self, shape: Sequence[int] | None) -> dict[str, float | None]:
        """Return the figures of a shape, all but `shape` in its record, the same on every process.

        `fsum` adds the figures of single batches exactly and rounds once. So the result does not depend on which
        process had which batch.
        """
        if self.original is not None:
            spreads = self.spreads
            *errors, cosines = self.gather(partial(self.original.compare, shape))
            distances = [math.fsum(each) / of_layer for each, of_layer in zip(errors, spreads, strict=True)]
            return {"distance": math.fsum(distances) / len(distances), "cosine": math.fsum(cosines) / self.sequences}
        if self.kind == "task_loss":
            predictions: list[Any] | None = None if self.score is None else []
            (sums,) = self.gather(partial(task_losses, self.model, self.share, shape, predictions))
            return {"task_loss": math.fsum(sums) / sum(self.counts), "score": self.compute_score(predictions)}
        means, correct = self.gather(partial(self.measure_share, shape))
        tokens = sum(self.counts)
        loss = math.fsum(mean * count for mean, count in zip(means, self.counts, strict=True)) / tokens
        return {"loss": loss, "perplexity": perplexity(loss), "accuracy": math.fsum(correct) / tokens}

    def compute_score(self, predictions: list[Any] | None) -> float | None:
        """Return the score of what this process predicts for its share, and the others for theirs."""
        if self.score is None or predictions is None:
            return None
        rows = self.in_order(predictions if self.processes == 1 else gather_object(predictions))
        return on_main_process(partial(compute_score, self.score, rows, self.batches), self.accelerator)

    @cached_property
    def spreads(self) -> list[float]:
        """For each layer, the sum of the squared distances of the original's states to their mean, over all tokens.

        Raises:
            ValueError: If one is not a number above 0, so that nothing can be divided by it.
        """
        assert self.original is not None
        columns = self.gather(self.original.moments)
        size = self.model.config.hidden_size + 1  # of the columns of a layer
        return [self.spread(columns[start : start + size]) for start in range(0, len(columns), size)]

    def spread(self, columns: list[list[float]]) -> float:
        """Return that of one layer, out of the sums of its states, and of their squares, over each batch."""
        *sums, squares = columns
        finite = all(map(math.isfinite, itertools.chain(squares, *sums)))
        spread = math.nan
        if finite:
            spread = math.fsum(squares) - math.fsum(math.fsum(each) ** 2 for each in sums) / sum(self.counts)
        if not spread > 0:
            raise ValueError(
                f"The hidden states of the original {'are all the same' if finite else 'are not finite'}, so no "
                "distance to them can be measured. Use more text, or check the weights of the original and the "
                "precision."
            )
        return spread

    @property
    def sequences(self) -> int:
        """Number of sequences that have a token."""
        return sum(int(batch["attention_mask"].any(1).sum()) for batch in self.batches)

    def gather(self, compute: Compute) -> list[list[float]]:
        """Call `compute` on every process; return the columns of its results, each in the order of the batches."""

        def inside() -> torch.Tensor:
            with self.autocast():
                return compute()

        figures = on_every_process(inside, self.accelerator)
        if self.accelerator is not None:
            figures = self.accelerator.gather(figures.to(self.accelerator.device))
        return [list(column) for column in zip(*self.in_order(figures.tolist()), strict=True)]

    def in_order(self, gathered: list[Any]) -> list[Any]:
        """Return what the first process has of each round, then the second, ..., in the order of the batches.

        The last round may hold copies of the last batch, which are left out.
        """
        rounds = len(gathered) // self.processes
        return [gathered[i % self.processes * rounds + i // self.processes] for i in range(len(self.batches))]

    def measure_share(self, shape: Sequence[int] | None) -> torch.Tensor:
        """Return what `measure_batch` returns for each batch of this process, (batches, 2).

        The figures stay on the device: if each were read at once, a GPU would wait between two batches.
        """
        return torch.stack([measure_batch(self.model, batch, shape) for batch in self.share])


def check_measurable(
    model: SuperShaperPreTrainedModel,
    measure: str,
    original: PreTrainedModel | None,
    score: Score | None,
    layers: str = "last",
) -> None:
    """Raise an error if a model has not what a measure needs; see `evaluate_shapes`."""
    check_choice("layers", layers, LAYERS)
    if layers != "last" and measure != "distance":
        raise ValueError(f'layers={layers!r} is for measure="distance" only. Leave it out.')
    if original is not None and measure != "distance":
        raise ValueError('original is compared with for measure="distance" only. Leave it out to measure the loss.')
    if score is not None and measure != "task_loss":
        raise ValueError('score is computed for measure="task_loss" only. Leave it out.')
    if original is not None:
        check_original(model, original, layers)
    if layers == "all":
        check_layers(model)
    if measure == "task_loss":
        check_task_head(model)
    if measure == "loss" and not has_masked_lm_head(model):
        raise ValueError(
            f'{type(model).__name__} has no masked-LM head, so it has no masked-LM loss. Use measure="distance".'
        )


def count_measured(batch: Batch, measure: str) -> float:
    """Return how many tokens of a batch are measured: those with a label, or that are not padding; or of its labels."""
    if measure == "task_loss":
        return count_labels(batch)
    counted = batch["labels"] != IGNORE_INDEX if measure == "loss" else batch["attention_mask"]
    return int(counted.sum())


def measure_batch(model: SuperShaperPreTrainedModel, batch: Batch, shape: Sequence[int] | None) -> torch.Tensor:
    """Return the mean loss of a batch in nats per label and its number of right predictions: (2,), float32."""
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
    output: Any = model(**batch, shape=shape, sparse_prediction=True)
    return torch.stack([output.loss.float(), (output.logits.argmax(-1) == labels).sum().float()])


def make_header(
    model: SuperShaperPreTrainedModel,
    batches: Sequence[Batch],
    precision: str = "no",
    measure: str = "loss",
    original: PreTrainedModel | None = None,
    score: Score | None = None,
    layers: str = "last",
) -> Header:
    """Return the header of a records file: which model is measured, in which way, on which data.

    Args:
        model: A supernet or a subnet.
        batches: The batches that it is measured on.
        precision: Dtype of autocast, such as `"bfloat16"`, or `"no"` without autocast.
        measure: `"loss"`, `"distance"` or `"task_loss"`.
        original: The model that a distance is measured to. By default it is the largest shape of `model`.
        score: The score of a task.
        layers: `"last"` or `"all"`, for a distance.
    """
    config = model.config
    fingerprint = fingerprint_encoder(model) if measure == "distance" else fingerprint_model(model)
    compared = fingerprint if original is None else fingerprint_encoder(original)
    return {
        "version": version("supershaper-hf"),
        "measure": measure,
        "model": fingerprint,
        "original": compared if measure == "distance" else None,
        "score": score_name(score),
        "layers": layers if measure == "distance" else None,
        "data": fingerprint_data(batches),
        "precision": precision,
        "num_layers": config.num_hidden_layers,
        "width_choices": config.width_choices,
        "hidden_size": config.hidden_size,
        "hidden_sizes": config.hidden_sizes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sequences": sum(len(batch["input_ids"]) for batch in batches),
        COUNTED[measure]: sum(count_measured(batch, measure) for batch in batches),
    }
