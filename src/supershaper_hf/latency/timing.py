"""Build subnets with random weights, run them on a CPU or a GPU, and stamp the time.

`Workload` checks the conditions of a measurement and builds its models and inputs. `SubnetTimer` times whole subnets.
`table` and `insensitivity` measure with these two. `time_models` times models that exist already.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checks import check_count
from ..devices import Clock, parse_device
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.modeling_supershaper import SuperShaperPreTrainedModel, empty_model
from ..model.shapes import SearchSpace


class SubnetTimer:
    """Times whole subnets.

    Every sweep runs each subnet once, in random order, so that a slow moment of the machine does not always meet the
    same one. Every subnet is a model with its own random weights, and runs as the one of `LatencyProbe` does.

    Args:
        space: The search space of the supernet.
        shapes: (n, layers): one subnet is built for each. A shape may occur more than once.
        device: See `LatencyTable.measure`, as for all arguments below.
        batch_size: Sequences in a batch.
        sequence_length: Tokens in a sequence.
        dtype: Type of weights and activations.
        seed: Random seed of the weights, the tokens and the order.

    Example:
        >>> from supershaper_hf import SuperShaperConfig
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> timer = SubnetTimer(SearchSpace.from_config(config), [[40, 96], [0, 16]], sequence_length=16)
        >>> timer.sweep()
        >>> timer.seconds.shape
        (1, 2)
    """

    def __init__(
        self,
        space: SearchSpace,
        shapes: Sequence[Sequence[int]] | np.ndarray,
        device: str | torch.device = "cpu",
        batch_size: int = 1,
        sequence_length: int = 128,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        self._workload = Workload(space, parse_device(device), batch_size, sequence_length, dtype, seed)
        self._models = [self._workload.model(shape, seed + index) for index, shape in enumerate(shapes)]
        self._batch = self._workload.batch()
        self._random = np.random.default_rng(seed)
        self._samples: list[np.ndarray] = []

    @property
    def seconds(self) -> np.ndarray:
        """The seconds of every kept sweep so far, (sweeps, n)."""
        return np.reshape(self._samples, (len(self._samples), len(self._models)))

    @torch.inference_mode()
    def sweep(self, keep: bool = True) -> None:
        """Run every subnet once, in random order. Without `keep` the seconds are thrown away, to warm up."""
        sample = _sweep(self._models, self._batch, self._workload.clock, self._random)
        if keep:
            self._samples.append(sample)


@torch.inference_mode()
def time_models(
    models: Sequence[SuperShaperPreTrainedModel],
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    sequence_length: int = 128,
    repeats: int = 20,
    seed: int = 0,
) -> list[float]:
    """Return the seconds of a forward pass of each model: the median over sweeps in random order.

    The models are moved to `device` and left there, in evaluation mode.

    Args:
        models: Models that take the same tokens. They keep their type of weights.
        device: See `LatencyTable.measure`, as for all arguments below.
        batch_size: Sequences in a batch.
        sequence_length: Tokens in a sequence, none of which is padding.
        repeats: Number of sweeps. Two more come first, to warm up.
        seed: Random seed of the tokens and the order.

    Raises:
        ValueError: If a number is too small, the sequence is too long, or the device is not available.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperModel
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> len(time_models([SuperShaperModel(config)], sequence_length=16, repeats=3))
        1
    """
    check_count("repeats", repeats)
    config: Any = models[0].config
    device = parse_device(device)
    moved = [torch.nn.Module.to(model, device).eval() for model in models]
    batch, random = draw_batch(config, device, batch_size, sequence_length, seed), np.random.default_rng(seed)
    samples = [_sweep(moved, batch, Clock(device), random) for _ in range(repeats + 2)]
    return np.median(samples[2:], axis=0).tolist()


def _sweep(
    models: Sequence[torch.nn.Module], batch: dict[str, torch.Tensor], clock: Clock, random: np.random.Generator
) -> np.ndarray:
    """Run every model once, in random order, and return the seconds of each, (n,)."""
    sample = np.empty(len(models))
    for index in random.permutation(len(models)):
        clock.synchronize()
        stamps = [clock.stamp()]
        models[index](**batch)
        stamps.append(clock.stamp())
        sample[index] = clock.intervals(stamps)[0]
    return sample


def check_size(config: SuperShaperConfig, batch_size: int, sequence_length: int) -> None:
    """Raise a ValueError unless a model can read batches of this size."""
    check_count("batch_size", batch_size)
    check_count("sequence_length", sequence_length)
    longest = config.max_position_embeddings
    if sequence_length > longest:
        raise ValueError(
            f"sequence_length={sequence_length} is above max_position_embeddings={longest}. Use at most {longest}."
        )


def draw_batch(
    config: SuperShaperConfig, device: torch.device, batch_size: int, sequence_length: int, seed: int
) -> dict[str, torch.Tensor]:
    """Draw random tokens without padding, with the other inputs that a tokenizer returns: (batch, length) each."""
    check_size(config, batch_size, sequence_length)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch_size, sequence_length), generator=generator)
    batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Workload:
    """The conditions of a measurement: what runs, on which device. It checks them, and makes models and inputs.

    Attributes:
        space: The search space of the supernet.
        device: The device to run on.
        batch_size: Sequences in a batch.
        sequence_length: Tokens in a sequence.
        dtype: Type of weights and activations.
        seed: Random seed of weights and tokens.

    Raises:
        ValueError: If a number is too small, the sequence is too long, or `dtype` is not a floating-point type.
    """

    space: SearchSpace
    device: torch.device
    batch_size: int
    sequence_length: int
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        check_size(self.config, self.batch_size, self.sequence_length)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(
                f"dtype={self.dtype!r} is not a floating-point type. Use torch.float32, torch.bfloat16 or "
                "torch.float16."
            )

    @property
    def config(self) -> SuperShaperConfig:
        return self.space.config

    @property
    def clock(self) -> Clock:
        return Clock(self.device)

    def model(self, shape: Sequence[int] | np.ndarray, seed: int) -> SuperShaperPreTrainedModel:
        """Build the subnet at `shape`, of any number of layers, with random weights in evaluation mode."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = len(shape)
        model = empty_model(self.space.model_class, config.subnet_config(list(shape)))
        model.to(self.dtype).to_empty(device=self.device)
        model.tie_weights()
        self._fill(model, seed)
        return model.eval()

    def bottleneck(self, width: int) -> torch.nn.Linear:
        """Build an output bottleneck from `width` to `hidden_size`."""
        bottleneck = torch.nn.Linear(width, self.config.hidden_size, device="meta", dtype=self.dtype)
        bottleneck.to_empty(device=self.device)
        self._fill(bottleneck, self.seed)
        return bottleneck.eval()

    def states(self, width: int) -> torch.Tensor:
        """Draw hidden states (batch, length, width)."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        size = (self.batch_size, self.sequence_length, width)
        return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)

    def batch(self) -> dict[str, torch.Tensor]:
        """Draw random tokens: see `draw_batch`."""
        return draw_batch(self.config, self.device, self.batch_size, self.sequence_length, self.seed)

    @torch.no_grad()
    def _fill(self, module: torch.nn.Module, seed: int) -> None:
        # A new bottleneck holds zeros and ones, on which a processor may be faster, or draw less power.
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in module.named_parameters():
            mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.normal_(mean, self.config.initializer_range, generator=generator)
