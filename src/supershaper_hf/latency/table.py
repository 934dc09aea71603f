"""Seconds of a subnet on this device: measured once per pair of neighbouring widths, added up for any shape.

`LatencyProbe` runs one subnet whose layers meet every pair of widths, and stamps the time between them;
`LatencyTable` keeps the medians and predicts from them. `timing.SubnetTimer` runs whole subnets, to compare with.

A subnet streams its weights from memory: when its first layer runs again, the other layers and the head have pushed its
weights out of the cache. The same layer timed in a loop of its own finds its weights there, and is too fast. So blocks
are never timed alone. Where a whole subnet fits into the cache, the table is an upper bound instead.

Example:
    >>> from supershaper_hf import SuperShaperConfig
    >>> from supershaper_hf.latency.table import LatencyTable
    >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
    >>> table = LatencyTable.measure(config, sequence_length=16, repeats=3)
    >>> table.predict([[40, 96], [0, 16]]).shape
    (2,)
"""

import json
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import check_count
from ..devices import device_name, local_devices, parse_device
from ..files import write_file
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.costs import ChainCost, chain_cost, parameter_cost
from .timing import Workload


FORMAT = "supershaper-hf latency table 1"
SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "hidden_act")  # that change time


@dataclass(frozen=True, eq=False)
class Entries:
    """One number for each part of a subnet; rows and columns in the order of the table's width choices.

    Attributes:
        embeddings: From the call to the first input bottleneck: embeddings, attention mask, Python around them.
        blocks: (widths, widths): input bottleneck from a width (row) to a width (column), and the layer behind it.
        leave: (widths,): the output bottleneck from a width to `hidden_size`.
        head: From there to the logits of every position.
    """

    embeddings: float
    blocks: np.ndarray
    leave: np.ndarray
    head: float

    def numbers(self) -> np.ndarray:
        return np.concatenate([[self.embeddings, self.head], np.ravel(self.blocks), np.ravel(self.leave)])


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Seconds of every part of a subnet, on one device and for one size of input. Make it with `measure`.

    Attributes:
        width_choices: The hidden sizes it knows, increasing; the last is `hidden_size`.
        seconds: Median over the sweeps.
        spread: Interquartile range of the sweeps over their median: .1 means that half of them were within 10 %.
        device: Name of the processor, with the number of threads, or of the GPU.
        dtype: Of weights and activations, such as `"float32"`.
        batch_size: Sequences in a batch.
        sequence_length: Tokens in a sequence, none of them padding.
        repeats: Number of sweeps.
        attention: Implementation, such as `"sdpa"`.
        torch_version: Of the measurement.
        sizes: Those of the configuration that change the time: see `SIZES`.
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

    def __post_init__(self) -> None:
        choices, widths = self.width_choices, len(self.width_choices)
        integers = all(type(width) is int for width in choices)
        if not choices or not integers or choices[0] <= 0 or sorted(set(choices)) != choices:
            raise ValueError(f"width_choices={choices!r} must be positive integers, strictly increasing.")
        if missing := set(SIZES) - set(self.sizes):
            raise ValueError(f"sizes={self.sizes} lacks {sorted(missing)}.")
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
        config: SuperShaperConfig,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        sequence_length: int = 128,
        dtype: torch.dtype = torch.float32,
        repeats: int = 20,
        warmup: int = 3,
        seed: int = 0,
    ) -> "LatencyTable":
        """Measure subnets of a supernet with `config` on `device`; see `LatencyProbe` for how.

        Keep the machine quiet meanwhile. For bert-base widths it takes about 1 GB in float32.

        Args:
            config: The supernet's configuration. Its number of layers does not matter.
            device: `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`. On a CPU the time is that of `torch.get_num_threads()`.
            batch_size: Sequences in a batch.
            sequence_length: Tokens in a sequence.
            dtype: Of weights and activations.
            repeats: Sweeps over all entries, of which the median is kept.
            warmup: Sweeps before them, which are thrown away.
            seed: Of the random weights, the tokens and the order of the pairs.

        Raises:
            ValueError: If `config` belongs to a subnet, the input does not fit it, or there is nothing to measure.
        """
        check_count("repeats", repeats)
        check_count("warmup", warmup, least=0)
        probe = LatencyProbe(config, device, batch_size, sequence_length, dtype, seed)
        for sweep in range(warmup + repeats):
            probe.sweep(keep=sweep >= warmup)
        return probe.table()

    def predict(self, shapes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return the predicted seconds (n,) of one forward pass of the subnets at `shapes` (n, layers).

        Any number of layers works; 0 drops a layer, so that the next kept one follows the last kept one.

        Raises:
            ValueError: If a width was not measured, or a shape drops every layer.
        """
        widths = np.asarray(shapes)
        if widths.ndim != 2 or not np.issubdtype(widths.dtype, np.integer):
            raise ValueError(
                f"shapes must be an integer array (n, layers), got {widths.dtype} {widths.shape}. For one shape, pass "
                "[shape]."
            )
        unknown = np.setdiff1d(widths, [0, *self.width_choices]).tolist()
        if unknown:
            raise ValueError(
                f"The latency table knows the widths {self.width_choices}, and 0 for dropped layers, but got {unknown}."
            )
        if not widths.any(axis=1).all():
            raise ValueError("A shape drops every layer: at least one layer must stay.")
        return chain_cost(self._terms(), self.width_choices[-1], widths)

    def chain_cost(self, config: SuperShaperConfig) -> ChainCost:
        """Return the terms that `search.pareto_front(cost=table)` and `evolutionary_search(latency=table)` add up.

        Warns if `config` has other sizes, or another attention implementation, than the one measured.

        Raises:
            ValueError: If a width choice of `config` was not measured.
        """
        unknown = sorted(set(config.width_choices or config.hidden_sizes or []) - set(self.width_choices))
        if unknown:
            raise ValueError(
                f"The configuration has the widths {unknown}, which are not in the latency table: it knows "
                f"{self.width_choices}. Measure one for this configuration: LatencyTable.measure(config)."
            )
        measured = {**self.sizes, "attention": self.attention}
        given = {name: getattr(config, name) for name in SIZES}
        given["attention"] = config._attn_implementation or self.attention  # of a configuration without a model: any
        other = [name for name in measured if given[name] != measured[name]]
        if other:
            warnings.warn(
                f"The latency table was measured with {', '.join(f'{name}={measured[name]}' for name in other)}, but "
                f"the configuration has {', '.join(f'{name}={given[name]}' for name in other)}: its seconds hold for "
                "the former. Measure one for this configuration: LatencyTable.measure(config).",
                stacklevel=2,
            )
        return self._terms()

    def width_costs(self) -> list[dict[str, Any]]:
        """Return what each width costs for its size: one record per width, from blocks that keep the width.

        Keys: `width`; `seconds` and `parameters` of the block; `relative`, its seconds per parameter over those of the
        widest block; `head_size`; and whether the width is a `multiple_of_8` or `multiple_of_64`, and the head size a
        `head_multiple_of_8`: the sizes that vector units and matrix units are built for.
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
        content: dict[str, Any] = {
            "format": FORMAT,
            **{field.name: getattr(self, field.name) for field in fields(self)},
        }
        for name in ("seconds", "spread"):
            entries = content[name]
            content[name] = {**asdict(entries), "blocks": entries.blocks.tolist(), "leave": entries.leave.tolist()}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
        write_file(file, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, file: str | Path) -> "LatencyTable":
        """Read a table written by `save`. Warns if it was measured on a device that this machine does not have.

        Raises:
            ValueError: If the file is damaged or holds something else.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            found = content.pop("format")
            if found != FORMAT:
                raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
            for name in ("seconds", "spread"):
                entries = content[name]
                content[name] = Entries(
                    embeddings=float(entries["embeddings"]),
                    blocks=np.array(entries["blocks"], dtype=np.float64),
                    leave=np.array(entries["leave"], dtype=np.float64),
                    head=float(entries["head"]),
                )
            table = cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is not a latency table of this version: {error!r}. Write it with LatencyTable.save."
            ) from error
        here = local_devices()
        if table.device not in here:
            warnings.warn(
                f"{file} was measured on {table.device}, this machine has {'; '.join(here)}: its seconds hold for "
                f"{table.device}. Measure this machine with LatencyTable.measure(config).",
                stacklevel=2,
            )
        return table

    def _terms(self) -> ChainCost:
        # Position 0 is a dropped layer, of no cost; the last one any width in between, which was not measured.
        choices = self.width_choices
        position = np.full(choices[-1] + 1, -1)
        position[[0, *choices]] = range(len(choices) + 1)
        blocks, leave = np.pad(self.seconds.blocks, 1), np.pad(self.seconds.leave, 1)
        blocks[-1], blocks[:, -1], leave[-1] = np.nan, np.nan, np.nan
        return ChainCost(
            "latency",
            fixed=self.seconds.embeddings + self.seconds.head,
            enter=lambda source, width: blocks[position[source], position[width]],
            layer=lambda width: np.zeros(np.shape(width)),  # in the block
            leave=lambda width: leave[position[width]],
        )


# Measuring


class LatencyProbe:
    """Samples every entry of a `LatencyTable`, one sweep at a time, so that sweeps can alternate with other runs.

    It is one subnet, with random weights, whose layers walk through every ordered pair of widths once. A sweep is one
    forward pass as a user makes it: token types and a mask of ones given, as a tokenizer does; logits of every
    position; evaluation mode; `torch.inference_mode`. A time stamp at each bottleneck tells the seconds of each block,
    whose input another layer has just written and whose weights are out of the cache. The output bottlenecks of the
    widths that the walk does not end with are run after it.

    Stamps cost about a microsecond each on a CPU, and a few where the device stamps.

    Arguments and errors are those of `LatencyTable.measure`.

    Example:
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, vocab_size=50, width_choices=[16, 96])
        >>> probe = LatencyProbe(config, sequence_length=16)
        >>> probe.sweep(keep=False)  # the first one warms up
        >>> probe.sweep()
        >>> probe.table().repeats
        1
    """

    def __init__(
        self,
        config: SuperShaperConfig,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        sequence_length: int = 128,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        self._workload = Workload(config, parse_device(device), batch_size, sequence_length, dtype, seed)
        self.width_choices = list(config.width_choices or [])
        self.walk = walk_through_pairs(self.width_choices, seed)
        self._model = self._workload.model(self.walk[1:], seed)
        self._batch = self._workload.batch()
        others = [(width, self._workload.bottleneck(width)) for width in self.width_choices[:-1]]
        self._others = [(bottleneck, self._workload.states(width)) for width, bottleneck in others]
        self._samples: list[np.ndarray] = []

    @torch.inference_mode()
    def sweep(self, keep: bool = True) -> None:
        """Take one sample of every entry; without `keep` throw it away, to warm up."""
        clock, stamps = self._workload.clock, []

        def stamp(*_: Any) -> None:
            stamps.append(clock.stamp())

        encoder = self._model.bert.encoder
        last = encoder.output_bottleneck[-1]
        with ExitStack() as hooks:
            for bottleneck in (*encoder.input_bottleneck, last):
                hooks.enter_context(bottleneck.register_forward_pre_hook(stamp))
            hooks.enter_context(last.register_forward_hook(stamp))
            clock.synchronize()
            stamp()
            self._model(**self._batch)
            stamp()
        for bottleneck, states in self._others:
            written = states.clone()  # in the cache, as if a layer had just written it
            stamp()
            bottleneck(written)
            stamp()
        passed = clock.intervals(stamps)
        within = len(self.walk) + 2  # embeddings, a block for each step of the walk, the output bottleneck, the head
        if keep:
            self._samples.append(np.concatenate([passed[:within], passed[within + 1 :: 2]]))

    def table(self) -> LatencyTable:
        """Return the medians of the sweeps so far.

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
            seconds=self._entries(middle.round(9)),  # nanoseconds, so that the file can be read
            spread=self._entries(spread.round(4)),
            device=device_name(workload.device),
            dtype=str(workload.dtype).removeprefix("torch."),
            batch_size=int(workload.batch_size),
            sequence_length=int(workload.sequence_length),
            repeats=len(self._samples),
            attention=self._model.config._attn_implementation,
            torch_version=torch.__version__,
            sizes={name: getattr(workload.config, name) for name in SIZES},
        )

    def _entries(self, sample: np.ndarray) -> Entries:
        """Sort a sample: embeddings, blocks along the walk, the last bottleneck, head, other bottlenecks."""
        widths = len(self.width_choices)
        index = np.searchsorted(self.width_choices, self.walk)
        blocks = np.empty((widths, widths))
        blocks[index[:-1], index[1:]] = sample[1 : len(self.walk)]
        last, head, *others = sample[len(self.walk) :]
        return Entries(float(sample[0]), blocks, np.array([*others, last]), float(head))


def walk_through_pairs(width_choices: Sequence[int], seed: int = 0) -> list[int]:
    """Return a walk from the last width to itself that takes the step between every ordered pair of widths once.

    Such a walk (an Eulerian circuit) exists, because as many steps lead into a width as out of it. Found by
    Hierholzer's algorithm, the steps of each width in an order drawn from `seed`.

    Returns:
        `len(width_choices) ** 2 + 1` widths, the first of them the source of the first step.

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
