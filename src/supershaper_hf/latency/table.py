"""Seconds of a subnet on this device: measured once for each pair of neighbouring widths, added up for any shape.

`LatencyProbe` runs one subnet in which every pair of widths occurs, and stamps the time between its layers.
`LatencyTable` keeps the medians and predicts from them. `timing.SubnetTimer` runs whole subnets, to compare with.

A subnet reads its weights from memory: when its first layer runs again, the other layers and the head have pushed that
layer's weights out of the cache. The same layer, timed alone in a loop, finds its weights in the cache and is too fast.
Blocks are therefore never timed alone. Where a whole subnet fits into the cache, the table is an upper bound.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from ..checks import as_numbers, check_count, check_number, check_widths
from ..devices import device_name, local_devices, parse_device
from ..files import read_json, write_json
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.costs import ChainCost, chain_cost, parameter_cost
from ..model.elastic import elastic_linear
from ..model.shapes import SearchSpace, shape_rows
from .timing import Workload


FORMAT = "supershaper-hf latency table 2"
# Names of the configuration's entries that change the time of a subnet.
SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "hidden_act")


@dataclass(frozen=True, eq=False)
class Entries:
    """One number for each part of a subnet. Rows and columns are in the order of the table's width choices.

    Attributes:
        embeddings: The part from the call to the first input bottleneck: embeddings, attention mask, Python code.
        blocks: (widths, widths): the input bottleneck from one width (row) to another (column), and the layer after it.
        leave: (widths,): the output bottleneck from a width to `hidden_size`.
        head: The part after it, up to the logits of every position.
    """

    embeddings: float
    blocks: np.ndarray
    leave: np.ndarray
    head: float

    def numbers(self) -> np.ndarray:
        """Return all numbers in one array (parts,)."""
        return np.concatenate([[self.embeddings, self.head], np.ravel(self.blocks), np.ravel(self.leave)])


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Seconds of every part of a subnet, on one device and for one size of input. Make it with `measure`.

    Attributes:
        width_choices: The hidden sizes that were measured, strictly increasing. The last one is `hidden_size`.
        seconds: Seconds of each part: the median over the sweeps.
        spread: Interquartile range of the sweeps, divided by their median: 0.1 means that half of them lie within 10 %.
        device: Name of the GPU, or of the processor with the number of threads.
        dtype: Type of weights and activations, such as `"float32"`.
        batch_size: Sequences in a batch.
        sequence_length: Tokens in a sequence, none of which is padding.
        repeats: Number of sweeps.
        attention: Name of the attention implementation, such as `"sdpa"`.
        torch_version: Version of torch that ran.
        sizes: The entries of the configuration that change the time: see `SIZES`.
        architecture: Name of the class of the subnets that were measured, with its head.

    Example:
        >>> from supershaper_hf import LatencyTable, SearchSpace, SuperShaperConfig
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> table = LatencyTable.measure(SearchSpace.from_config(config), sequence_length=16, repeats=3)
        >>> table.predict([[40, 96], [0, 16]]).shape
        (2,)
        >>> type(table.predict([40, 96]))
        <class 'float'>
        >>> table.width_costs()[-1]["width"]
        96
    """

    width_choices: list[int]
    seconds: Entries
    spread: Entries
    device: str
    dtype: str
    batch_size: int
    sequence_length: int
    repeats: int
    attention: str
    torch_version: str
    sizes: dict[str, Any]
    architecture: str = "SuperShaperForMaskedLM"  # of tables that do not say it

    def __post_init__(self) -> None:
        check_widths("width_choices", self.width_choices)
        choices, widths = self.width_choices, len(self.width_choices)
        for name in ("batch_size", "sequence_length", "repeats"):
            check_count(name, getattr(self, name))
        for name in ("device", "dtype", "attention", "torch_version", "architecture"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} must be text.")
        if set(self.sizes) != set(SIZES):
            raise ValueError(f"sizes has the entries {sorted(self.sizes)}, but needs {sorted(SIZES)}.")
        for name in SIZES[:-1]:
            check_count(name, self.sizes[name])
        if not isinstance(self.sizes["hidden_act"], str):
            raise ValueError(f"hidden_act={self.sizes['hidden_act']!r} must be text.")
        if self.sizes["hidden_size"] != choices[-1]:
            raise ValueError(f"width_choices={choices} must end with hidden_size={self.sizes['hidden_size']}.")
        for name, entries in (("seconds", self.seconds), ("spread", self.spread)):
            if entries.blocks.shape != (widths, widths) or entries.leave.shape != (widths,):
                raise ValueError(
                    f"{name}: {widths} width choices need blocks ({widths}, {widths}) and leave ({widths},), got "
                    f"{entries.blocks.shape} and {entries.leave.shape}."
                )
            wrong = [number for number in entries.numbers().tolist() if not 0 <= number < np.inf]
            if wrong:
                raise ValueError(f"{name} must be finite and not negative, got {wrong}.")

    @classmethod
    def measure(
        cls,
        space: SearchSpace | SuperShaperConfig,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        sequence_length: int = 128,
        dtype: torch.dtype = torch.float32,
        repeats: int = 20,
        warmup: int = 3,
        seed: int = 0,
    ) -> "LatencyTable":
        """Measure the parts of the subnets of a search space on `device`. See `LatencyProbe` for the method.

        Keep the machine quiet meanwhile. For bert-base widths in float32, it takes about 1 GB of memory.

        Args:
            space: The search space, or the supernet's configuration, from which the search space is made. The number
                of layers does not matter.
            device: `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`. A CPU runs `torch.get_num_threads()` threads.
            batch_size: Sequences in a batch.
            sequence_length: Tokens in a sequence.
            dtype: Type of weights and activations.
            repeats: Number of sweeps over all parts. The table keeps their median.
            warmup: Number of sweeps before them, which are thrown away.
            seed: Random seed of the weights, the tokens and the order of the pairs.

        Raises:
            ValueError: If the configuration belongs to a subnet, a number is too small, or the sequence is too long.
        """
        check_count("repeats", repeats)
        check_count("warmup", warmup, least=0)
        if isinstance(space, SuperShaperConfig):
            space = SearchSpace.from_config(space)
        probe = LatencyProbe(space, device, batch_size, sequence_length, dtype, seed)
        for sweep in range(warmup + repeats):
            probe.sweep(keep=sweep >= warmup)
        return probe.table()

    @classmethod
    def load_or_measure(
        cls,
        file: str | Path,
        space: SearchSpace,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        sequence_length: int = 128,
        seed: int = 0,
    ) -> "LatencyTable":
        """Load the table in `file`, or measure it and save it there if there is no such file.

        Args:
            file: The file of the table.
            space: See `measure`, as for all arguments below.
            device: The device to measure on.
            batch_size: Sequences in a batch.
            sequence_length: Tokens in a sequence.
            seed: Random seed of a new measurement.

        Raises:
            ValueError: If the table in the file was measured for a supernet of other sizes, or on another device, batch
                size or sequence length.

        Example:
            >>> table = LatencyTable.load_or_measure("latency.json", space, device="cuda")  # doctest: +SKIP
        """
        if not Path(file).exists():
            table = cls.measure(space, device, batch_size, sequence_length, seed=seed)
            table.save(file)
            return table
        table = cls.load(file)
        asked = {
            "device": device_name(parse_device(device)),
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "width_choices": space.width_choices,
            "sizes": {name: getattr(space.config, name) for name in SIZES},
            "architecture": space.model_class.__name__,
        }
        if stored := {name: getattr(table, name) for name in asked if getattr(table, name) != asked[name]}:
            raise ValueError(
                f"{file} was measured with {stored}, but this call asks for {asked}. Remove it to measure again, or "
                "give another file."
            )
        return table

    @overload
    def predict(self, shapes: Sequence[int]) -> float: ...
    @overload
    def predict(self, shapes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray: ...
    def predict(self, shapes):
        """Return the predicted seconds of one forward pass of the subnets at `shapes`.

        Args:
            shapes: One shape or many, see `model.shapes.shape_rows`, with any number of layers. Where a width is 0, the
                layer is dropped: the next kept layer follows the last kept one.

        Returns:
            A float for one shape, an array (n,) for many.

        Raises:
            ValueError: If a width was not measured, or a shape drops every layer.
        """
        widths, single = shape_rows(shapes)
        unknown = np.setdiff1d(widths, [0, *self.width_choices]).tolist()
        if unknown:
            raise ValueError(
                f"The latency table knows the widths {self.width_choices}, and 0 for dropped layers, but got {unknown}."
            )
        if not widths.any(axis=1).all():
            raise ValueError("A shape drops every layer: at least one layer must stay.")
        seconds = chain_cost(self._terms(), self.width_choices[-1], widths)
        return float(seconds[0]) if single else seconds

    def chain_cost(self, config: SuperShaperConfig) -> ChainCost:
        """Return the terms that `pareto_front(cost=table)` and `evolutionary_search(latency=table)` add up.

        Warns if `config` has other sizes, or another attention implementation, than the measured subnets.

        Raises:
            ValueError: If a width choice of `config` was not measured.
        """
        unknown = sorted(set(config.width_choices or config.hidden_sizes or []) - set(self.width_choices))
        if unknown:
            raise ValueError(
                f"The configuration has the widths {unknown}, which are not in the latency table: it knows "
                f"{self.width_choices}. Measure a table for this configuration with LatencyTable.measure."
            )
        measured = {**self.sizes, "attention": self.attention}
        given = {name: getattr(config, name) for name in SIZES}
        given["attention"] = config._attn_implementation or self.attention  # None if no model was built: any fits
        other = [name for name in measured if given[name] != measured[name]]
        if other:
            warnings.warn(
                f"The latency table was measured with {', '.join(f'{name}={measured[name]}' for name in other)}, but "
                f"the configuration has {', '.join(f'{name}={given[name]}' for name in other)}: its seconds hold for "
                "the former. Measure a table for this configuration with LatencyTable.measure.",
                stacklevel=2,
            )
        return self._terms()

    def width_costs(self) -> list[dict[str, Any]]:
        """Return what each width costs for its size: one mapping per width, for the block from this width to itself.

        The keys are `width`, `seconds` and `parameters` of the block, `relative` (its seconds per parameter over those
        of the widest block), `head_size`, and whether the width is a `multiple_of_8` or a `multiple_of_64` and the head
        size is a multiple of 8 (`head_multiple_of_8`): vector units and matrix units are built for such sizes.
        """
        cost = parameter_cost(SuperShaperConfig(**self.sizes, width_choices=self.width_choices, num_hidden_layers=1))
        rows: list[dict[str, Any]] = []
        for width, seconds in zip(self.width_choices, self.seconds.blocks.diagonal().tolist()):
            head_size = width // self.sizes["num_attention_heads"]
            rows.append(
                {
                    "width": width,
                    "seconds": seconds,
                    "parameters": cost.enter(width, width) + cost.layer(width),
                    "head_size": head_size,
                    "multiple_of_8": width % 8 == 0,
                    "multiple_of_64": width % 64 == 0,
                    "head_multiple_of_8": head_size % 8 == 0,
                }
            )
        widest = rows[-1]["seconds"] / rows[-1]["parameters"]
        return [{**row, "relative": row["seconds"] / row["parameters"] / widest} for row in rows]

    def save(self, file: str | Path) -> None:
        """Write the table as JSON, one attribute a line."""
        content: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("seconds", "spread"):
            entries = content[name]
            content[name] = {**asdict(entries), "blocks": entries.blocks.tolist(), "leave": entries.leave.tolist()}
        write_json(file, FORMAT, content)

    @classmethod
    def load(cls, file: str | Path) -> "LatencyTable":
        """Read a table written by `save`. Warns if it was measured on a device that this machine does not have.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If `file` is a folder, is damaged, or holds something else.
        """
        if Path(file).is_dir():
            raise ValueError(f"{file} is a folder. Give the file in it that LatencyTable.save has written.")
        content = read_json(file, FORMAT)
        try:
            for name in ("seconds", "spread"):
                content[name] = _read_entries(**content[name])
            table = cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{file} holds no latency table: {reason}. Write it with LatencyTable.save.") from error
        here = local_devices()
        if table.device not in here:
            warnings.warn(
                f"{file} was measured on {table.device}, but this machine has {'; '.join(here)}: its seconds hold for "
                f"{table.device}. Measure a table on this machine with LatencyTable.measure.",
                stacklevel=2,
            )
        return table

    def _terms(self) -> ChainCost:
        # Position 0 stands for a dropped layer, which costs nothing; the last one for a width that was not measured.
        known = np.array([0, *self.width_choices])
        blocks, leave = np.pad(self.seconds.blocks, 1), np.pad(self.seconds.leave, 1)
        blocks[-1], blocks[:, -1], leave[-1] = np.nan, np.nan, np.nan

        def position(width: Any) -> np.ndarray:
            place = np.minimum(np.searchsorted(known, width), len(known) - 1)
            return np.where(known[place] == width, place, len(known))

        return ChainCost(
            "latency",
            fixed=self.seconds.embeddings + self.seconds.head,
            enter=lambda source, width: blocks[position(source), position(width)],
            layer=lambda width: np.zeros(np.shape(width)),  # the time of the layer is part of its block
            leave=lambda width: leave[position(width)],
        )


def _read_entries(embeddings: Any, blocks: Any, leave: Any, head: Any) -> Entries:
    for name, value in (("embeddings", embeddings), ("head", head)):
        check_number(name, value)
    return Entries(float(embeddings), as_numbers("blocks", blocks), as_numbers("leave", leave), float(head))


# Measuring


class LatencyProbe:
    """Measures every part of a `LatencyTable`, one sweep at a time, so that sweeps can alternate with other runs.

    It builds one subnet with random weights. Its neighbouring layers have every ordered pair of widths once. A
    sweep is one forward pass as a user runs it: with the token types and the mask of ones that a tokenizer returns,
    logits of every position, evaluation mode and `torch.inference_mode`. Time stamps at the bottlenecks give the
    seconds of each block: its input was just written by the layer before, and its weights are out of the cache. The
    output bottlenecks of the other widths run after this pass.

    A stamp costs about a microsecond on a CPU, and a few microseconds on a GPU.

    Args:
        space: The search space of the supernet.
        device: See `LatencyTable.measure`, as for all arguments below.
        batch_size: Sequences in a batch.
        sequence_length: Tokens in a sequence.
        dtype: Type of weights and activations.
        seed: Random seed of the weights, the tokens and the order of the pairs.

    Example:
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, vocab_size=50, width_choices=[16, 96])
        >>> probe = LatencyProbe(SearchSpace.from_config(config), sequence_length=16)
        >>> probe.sweep(keep=False)  # the first one warms up
        >>> probe.sweep()
        >>> probe.table().repeats
        1
    """

    def __init__(
        self,
        space: SearchSpace,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        sequence_length: int = 128,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        self._workload = Workload(space, parse_device(device), batch_size, sequence_length, dtype, seed)
        self.width_choices = space.width_choices
        self.walk = walk_through_pairs(self.width_choices, seed)
        self._model = self._workload.model(self.walk[1:], seed)
        self._batch = self._workload.batch()
        others = [(width, self._workload.bottleneck(width)) for width in self.width_choices[:-1]]
        self._others = [(bottleneck, self._workload.states(width)) for width, bottleneck in others]
        self._samples: list[np.ndarray] = []

    @torch.inference_mode()
    def sweep(self, keep: bool = True) -> None:
        """Take one sample of every part. Without `keep` it is thrown away, to warm up."""
        clock, stamps = self._workload.clock, []

        def stamp(*_: Any) -> None:
            stamps.append(clock.stamp())

        encoder: Any = self._model.base_model.encoder
        with ExitStack() as hooks:  # none on a linear map, which would then take all tokens at once: see `in_pieces`
            hooks.enter_context(encoder.register_forward_pre_hook(stamp))
            for module in (*encoder.layer, encoder):
                hooks.enter_context(module.register_forward_hook(stamp))
            clock.synchronize()
            stamp()
            self._model(**self._batch)
            stamp()
        for bottleneck, states in self._others:
            written = states.clone()  # then it is in the cache, as if a layer had just written it
            stamp()
            elastic_linear(bottleneck, written)
            stamp()
        passed = clock.intervals(stamps)
        within = len(self.walk) + 2  # embeddings, a block for each step of the walk, output bottleneck, head
        if keep:
            self._samples.append(np.concatenate([passed[:within], passed[within + 1 :: 2]]))

    def table(self) -> LatencyTable:
        """Return a table with the medians of the kept sweeps so far.

        Raises:
            ValueError: If no sweep was kept.
        """
        if not self._samples:
            raise ValueError("The probe has no samples yet. Call sweep() at least once, better 20 times.")
        low, middle, high = np.percentile(self._samples, [25, 50, 75], axis=0)
        spread = np.divide(high - low, middle, out=np.zeros_like(middle), where=middle > 0)
        workload = self._workload
        return LatencyTable(
            width_choices=self.width_choices,
            seconds=self._entries(middle.round(9)),  # in nanoseconds, which keeps the file short
            spread=self._entries(spread.round(4)),
            device=device_name(workload.device),
            dtype=str(workload.dtype).removeprefix("torch."),
            batch_size=int(workload.batch_size),
            sequence_length=int(workload.sequence_length),
            repeats=len(self._samples),
            attention=self._model.config._attn_implementation,
            torch_version=torch.__version__,
            sizes={name: getattr(workload.config, name) for name in SIZES},
            architecture=type(self._model).__name__,
        )

    def _entries(self, sample: np.ndarray) -> Entries:
        """Sort a sample (parts,), whose order is embeddings, blocks along the walk, last bottleneck, head, others."""
        widths = len(self.width_choices)
        index = np.searchsorted(self.width_choices, self.walk)
        blocks = np.empty((widths, widths))
        blocks[index[:-1], index[1:]] = sample[1 : len(self.walk)]
        last, head, *others = sample[len(self.walk) :]
        return Entries(float(sample[0]), blocks, np.array([*others, last]), float(head))


def walk_through_pairs(width_choices: Sequence[int], seed: int = 0) -> list[int]:
    """Return a walk from the last width back to it that takes the step of every ordered pair of widths once.

    Such a walk (an Eulerian circuit) exists, because as many steps lead to a width as away from it. It is found with
    Hierholzer's algorithm, which takes the steps away from a width in an order drawn from `seed`.

    Returns:
        `len(width_choices) ** 2 + 1` widths. The first one is the source of the first step.

    Example:
        >>> walk_through_pairs([16, 96], seed=0)
        [96, 96, 16, 16, 96]
    """
    random = np.random.default_rng(seed)
    steps = {width: random.permutation(width_choices).tolist() for width in width_choices}
    path, walk = [width_choices[-1]], []
    while path:
        if steps[path[-1]]:
            path.append(steps[path[-1]].pop())
        else:
            walk.append(path.pop())
    return walk[::-1]
