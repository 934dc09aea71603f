"""Measure many shapes of one supernet: the masked-LM loss of each on the same masked text.

A record depends only on the model, the text and the shape. It does not depend on the other shapes, on interruptions, or
on the number of processes. On the same device and with the same number of threads it is the same bit for bit.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..devices import copy_mapped_weights
from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperForMaskedLM
from ..processes import on_every_process, on_main_process
from .records import Header, Record, append_record, hold_records, open_records, perplexity


# The settings of a configuration that decide the loss, besides the weights.
SIZES = (
    "hidden_size",
    "hidden_sizes",
    "width_choices",
    "merged_bottlenecks",
    "head_slicing",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "tie_word_embeddings",
)

Batch = dict[str, torch.Tensor]
Key = tuple[int, ...]  # a shape


@overload
def evaluate_shapes(
    model: SuperShaperForMaskedLM,
    batches: Sequence[Batch],
    shapes: Sequence[int],
    description: str = ...,
    accelerator: Accelerator | None = ...,
    records_file: str | Path | None = ...,
) -> Record: ...
@overload
def evaluate_shapes(
    model: SuperShaperForMaskedLM,
    batches: Sequence[Batch],
    shapes: Sequence[Sequence[int] | None] | np.ndarray,
    description: str = ...,
    accelerator: Accelerator | None = ...,
    records_file: str | Path | None = ...,
) -> list[Record]: ...
@torch.no_grad()
def evaluate_shapes(
    model: SuperShaperForMaskedLM,
    batches: Sequence[Batch],
    shapes: Sequence[Any] | np.ndarray,
    description: str = "Measuring shapes",
    accelerator: Accelerator | None = None,
    records_file: str | Path | None = None,
) -> Record | list[Record]:
    """Measure each shape on every labelled token of `batches`.

    With `records_file`, every record is written as soon as it is measured. After a kill the same call continues: only
    the shape that was being measured is lost. More shapes can be measured into the same file later.

    Weights that are still mapped to their file are copied into memory first, see `devices.copy_mapped_weights`.

    Args:
        model: A supernet, or a subnet with `shapes=[None]`. Its mode, training or evaluation, stays.
        batches: Masked batches from `fixed_masks`.
        shapes: Many shapes, or one. `None` in the list is the model's own full shape. A shape that occurs twice is
            measured once.
        description: Label of the progress bar.
        accelerator: Its processes share the batches, compute in its mixed precision, and all return the same records.
            An error on one process is raised on all of them. By default one process measures alone.
        records_file: A JSON lines file that records are added to, see `records`. By default none is written. Only
            one run at a time may use it, and only its main process reads and writes it.

    Returns:
        One record per shape, in the order of `shapes`, or a single record for a single shape. A record is a dictionary
        with `shape`, `loss` (nats per labelled token), `perplexity` (infinity where it overflows) and `accuracy` (share
        of the labelled tokens that are predicted exactly).

    Raises:
        TypeError: If a shape is not a sequence of integers.
        ValueError: If no token is labelled, a shape is not allowed, the processes have different shapes, text or
            weights, or `records_file` was begun with another model, other data or another precision, or has no valid
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
    """
    single = _is_one_shape(shapes)
    many: list[Any] = [shapes] if single else list(shapes)

    def prepare() -> tuple[list[Key], Evaluation]:
        copy_mapped_weights(model)
        return [_key(model, shape) for shape in many], Evaluation(model, batches, accelerator)

    asked, evaluation = on_every_process(prepare, accelerator)
    evaluation.check_same_call(asked)
    given = dict(zip(asked, many, strict=True))
    known: dict[Key, Record] = {}
    with evaluation_mode(model), ExitStack() as held:
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


def _key(model: SuperShaperForMaskedLM, shape: Sequence[int] | None) -> Key:
    """Return the widths of a shape, or raise an error that says why the model cannot have it."""
    own: Sequence[int] = model.config.hidden_sizes or []  # a model always has them
    return tuple(own if shape is None else model.config.normalize_shape(shape))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Turn dropout off. Afterwards, also after an error, the model is in the mode in which it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Evaluation:
    """This process's share of the batches on its device, and how a shape is measured on all of them.

    Raises:
        ValueError: If no token of the batches is labelled.
    """

    def __init__(
        self, model: SuperShaperForMaskedLM, batches: Sequence[Batch], accelerator: Accelerator | None
    ) -> None:
        self.model, self.accelerator = model, accelerator
        self.batches = [batch for batch in batches if (batch["labels"] != IGNORE_INDEX).any()]
        if not self.batches:
            raise ValueError("No token of the batches is labelled. Use more text, or a higher mlm_probability.")
        self.labelled = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in self.batches]
        self.processes = 1 if accelerator is None else accelerator.num_processes
        rank = 0 if accelerator is None else accelerator.process_index
        # FSDP needs every process in every forward pass. A process that has no batch left repeats the last one, and
        # the result is not used.
        count = len(self.batches)
        rounds = math.ceil(count / self.processes)
        share = [self.batches[min(i, count - 1)] for i in range(rank, rounds * self.processes, self.processes)]
        self.share = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in share]

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
        header = on_every_process(lambda: make_header(self.model, self.batches, self.precision()), self.accelerator)
        self._agree(header["model"], "have other weights", "Load the same model on each.")

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

        inputs = {name: tensor[:1] for name, tensor in self.share[0].items() if name != "labels"}
        with self.model.get_input_embeddings().register_forward_pre_hook(look), self.autocast():
            self.model(**inputs)
        return seen[0]

    def measure(self, shape: Sequence[int] | None) -> dict[str, float]:
        """Return `loss`, `perplexity` and `accuracy` of a shape, the same on every process.

        The figures of single batches are gathered, and `fsum` adds them exactly and rounds once. So the result does not
        depend on which process had which batch.
        """
        figures = on_every_process(partial(self.measure_share, shape), self.accelerator)
        if self.accelerator is not None:
            figures = self.accelerator.gather(figures.to(self.accelerator.device))
        # From (process, round) to the order of the batches; the last round may hold copies of the last batch.
        figures = figures.view(self.processes, -1, 2).transpose(0, 1).reshape(-1, 2)[: len(self.labelled)]
        means, correct = figures.T.tolist()
        tokens = sum(self.labelled)
        loss = math.fsum(mean * count for mean, count in zip(means, self.labelled, strict=True)) / tokens
        return {"loss": loss, "perplexity": perplexity(loss), "accuracy": math.fsum(correct) / tokens}

    def measure_share(self, shape: Sequence[int] | None) -> torch.Tensor:
        """Return what `measure_batch` returns for each batch of this process, (batches, 2).

        The figures stay on the device: if each were read at once, a GPU would wait between two batches.
        """
        with self.autocast():
            return torch.stack([measure_batch(self.model, batch, shape) for batch in self.share])


def measure_batch(model: SuperShaperForMaskedLM, batch: Batch, shape: Sequence[int] | None) -> torch.Tensor:
    """Return the mean loss of a batch in nats per label and its number of right predictions: (2,), float32."""
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX]
    output: Any = model(**batch, shape=shape, sparse_prediction=True)
    return torch.stack([output.loss.float(), (output.logits.argmax(-1) == labels).sum().float()])


# What was measured


def make_header(model: SuperShaperForMaskedLM, batches: Sequence[Batch], precision: str = "no") -> Header:
    """Return the header of a records file: which model is measured, on which data.

    Args:
        model: A supernet or a subnet.
        batches: The batches that it is measured on.
        precision: Dtype of autocast, such as `"bfloat16"`, or `"no"` without autocast.
    """
    config = model.config
    labels = [batch["labels"] for batch in batches]
    return {
        "version": version("supershaper-hf"),
        "model": fingerprint_model(model),
        "data": fingerprint_data(batches),
        "precision": precision,
        "num_layers": config.num_hidden_layers,
        "width_choices": config.width_choices,
        "hidden_size": config.hidden_size,
        "hidden_sizes": config.hidden_sizes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sequences": sum(len(rows) for rows in labels),
        "labelled_tokens": sum(int((rows != IGNORE_INDEX).sum()) for rows in labels),
    }


def fingerprint_model(model: SuperShaperForMaskedLM) -> str:
    """Return the SHA-256 of what decides a model's predictions: its sizes, and every weight with its dtype.

    It does not depend on the device, nor on how many processes FSDP (version 2) shards the weights over. With FSDP all
    processes have to call it. It gathers one tensor at a time, so it needs memory for the largest one only.
    """
    digest = hashlib.sha256(json.dumps({name: getattr(model.config, name) for name in SIZES}).encode())
    tensors = model.state_dict()
    for name in sorted(tensors.keys() - model.all_tied_weights_keys):
        tensor = tensors[name]
        _add_tensor(digest, name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)
    return digest.hexdigest()


def fingerprint_data(batches: Sequence[Batch]) -> str:
    """Return the SHA-256 of all tensors of all batches, in order: other masks or another batch size are other data."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        for name in sorted(batch):
            _add_tensor(digest, f"{number} {name}", batch[name])
    return digest.hexdigest()


def _add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add the name, dtype, size and bytes of a tensor to a hash."""
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    # It is copied, because after `numpy()` `copy_mapped_weights` would take the tensor's memory for mapped. It is seen
    # as bytes, because NumPy has no bfloat16.
    copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    digest.update(copied.view(-1).view(torch.uint8).numpy())
