"""What a subnet costs: parameters and floating-point operations of many shapes at once, without building any.

Both costs, and the seconds of a `latency.LatencyTable`, are sums of terms that involve one layer, or one layer and the
kept layer before it. `ChainCost` holds these terms. `chain_cost` adds them up for every row of an array of shapes, and
`search/pareto.py` minimises over the same terms exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import nn

from ..checks import check_count
from .configuration_supershaper import SuperShaperConfig


class ChainCost(NamedTuple):
    """A cost that is a sum along the chain embeddings -> layers -> head. Widths are integers or integer arrays.

    Attributes:
        name: `"parameters"`, `"flops"` or `"latency"` (seconds).
        fixed: Cost of the embeddings and the head, which every shape has. It is an int if all terms are integers, else
            a float.
        enter: Function of two widths: the cost of the bottleneck from the first (`hidden_size` for the embeddings) to
            the second.
        layer: Function of one width: the cost of a layer of this width.
        leave: Function of one width: the cost of the bottleneck from the last kept layer to `hidden_size`.
    """

    name: str
    fixed: float
    enter: Callable[[Any, Any], Any]
    layer: Callable[[Any], Any]
    leave: Callable[[Any], Any]


class HasChainCost(Protocol):
    """An object that has a cost for a configuration, such as a `latency.LatencyTable`."""

    def chain_cost(self, config: SuperShaperConfig) -> ChainCost: ...


Cost = str | HasChainCost  # what users give: "parameters", "flops", or a latency table


class Surroundings(NamedTuple):
    """What every subnet has around its encoder: the embeddings and the head. They do not depend on the shape.

    Attributes:
        model_class: The class of the subnet, which has the head.
        parameters: Parameters of embeddings and head, tied weights once.
        token_flops: Operations of the head on each token.
        sequence_flops: Operations of the head on each sequence: the pooler, and what reads it.
    """

    model_class: type
    parameters: int
    token_flops: int
    sequence_flops: int

    @classmethod
    def of(cls, model: Any) -> "Surroundings":
        """Count them in a supernet or a subnet, which may be on the meta device."""
        base = model.base_model
        encoder = set(base.encoder.parameters())
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter not in encoder)
        inside = set(base.encoder.modules())
        maps = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]
        flops = sum(2 * module.in_features * module.out_features for module in maps)
        pooled = base.pooler is not None
        return cls(type(model), parameters, token_flops=0 if pooled else flops, sequence_flops=flops if pooled else 0)


def chain_cost(cost: ChainCost, hidden_size: int, shapes: np.ndarray) -> np.ndarray:
    """Return the (n,) costs of integer `shapes` (n, layers). A dropped layer (width 0) costs nothing."""
    total = np.full(len(shapes), cost.fixed)  # an integer array if all terms are integers
    source = np.full(len(shapes), hidden_size, dtype=np.int64)
    for width in np.asarray(shapes, dtype=np.int64).T:
        kept = width > 0
        total += np.where(kept, cost.enter(source, width) + cost.layer(width), 0)
        source = np.where(kept, width, source)
    return total + cost.leave(source)


def parameter_cost(config: SuperShaperConfig, surroundings: Surroundings | None = None) -> ChainCost:
    """Count the parameters of a subnet, tied weights once. Without `surroundings` it has a masked-LM head.

    The figures of the 2021 paper are slightly lower: they leave out the bias of the decoder, and count the LayerNorm of
    the head at the width of the last layer.

    Raises:
        ValueError: If a shape of `config` has more parameters than 64 bits can count.
    """
    full, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    embeddings = (vocab + config.max_position_embeddings + config.type_vocab_size + 2) * full
    head = full * full + full + 2 * full + vocab + (0 if config.tie_word_embeddings else vocab * full)
    cost = ChainCost(
        "parameters",
        fixed=embeddings + head if surroundings is None else surroundings.parameters,
        enter=lambda source, width: source * width + width,
        layer=lambda width: 4 * (width * width + width) + 2 * ffn * width + ffn + width + 4 * width,
        leave=lambda width: width * full + full,
    )
    return _countable(cost, config, "Use smaller sizes.")


def flops_cost(config: SuperShaperConfig, sequence_length: int, surroundings: Surroundings | None = None) -> ChainCost:
    """Count the floating-point operations of one forward pass of a subnet over one sequence.

    A multiplication and an addition in a matrix product count as two operations. Without `surroundings` the subnet has
    a masked-LM head, which is counted on every position. Element-wise work (LayerNorm, softmax, activations, biases)
    is not counted, as in `torch.utils.flop_counter`.

    Raises:
        ValueError: If `sequence_length` is not an integer of at least 1, or a shape of `config` needs more operations
            than 64 bits can count.
    """
    check_count("sequence_length", sequence_length)
    full, ffn, vocab, length = config.hidden_size, config.intermediate_size, config.vocab_size, int(sequence_length)
    head = 2 * length * full * (full + vocab)
    if surroundings is not None:
        head = length * surroundings.token_flops + surroundings.sequence_flops
    cost = ChainCost(
        "flops",
        fixed=head,
        enter=lambda source, width: 2 * length * source * width,
        layer=lambda width: 2 * length * (4 * width * width + 2 * ffn * width) + 4 * length * length * width,
        leave=lambda width: 2 * length * width * full,
    )
    return _countable(cost, config, f"Use a smaller sequence_length than {length:,}.")


def _countable(cost: ChainCost, config: SuperShaperConfig, advice: str) -> ChainCost:
    """Return `cost` if that of the largest shape fits into 64 bits: many shapes are counted in an integer array."""
    full = config.hidden_size
    largest = cost.fixed + config.num_hidden_layers * (cost.enter(full, full) + cost.layer(full)) + cost.leave(full)
    if largest > np.iinfo(np.int64).max:
        raise ValueError(f"The largest shape has more {cost.name} than 64 bits can count. {advice}")
    return cost


def training_flops(
    config: SuperShaperConfig, shapes: Sequence[Sequence[int]], sequences: int, length: int, labelled: int
) -> int:
    """Count the operations of training on one batch at each of `shapes`, forward and backward.

    The backward pass of a matrix product is two products of the same size. The masked-LM head runs on the labelled
    positions only. A separate teacher model is not counted.

    Args:
        config: Configuration of the supernet or subnet.
        shapes: The shapes that are trained on the batch, with one hidden size per layer.
        sequences: Number of sequences in the batch.
        length: Number of tokens in each sequence, padding included.
        labelled: Number of labelled tokens in the batch.
    """
    full, cost = config.hidden_size, flops_cost(config, length)
    encoder = sum(chain_cost(cost._replace(fixed=0), full, np.array(shapes)).tolist())  # Python integers never overflow
    head = len(shapes) * 2 * int(labelled) * full * (full + config.vocab_size)
    return 3 * (int(sequences) * encoder + head)
