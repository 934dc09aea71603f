"""What a subnet costs: parameters and floating-point operations of many shapes at once, without building any.

Both, and the seconds of a `latency.LatencyTable`, are sums of terms that involve one layer, or one layer and the kept
layer before it. `ChainCost` holds these terms: `chain_cost` adds them up for every row of an array of shapes, and
`search.py` minimises over the same terms exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .configuration_supershaper import SuperShaperConfig


class ChainCost(NamedTuple):
    """A cost that is a sum along the chain embeddings -> layers -> head. Widths are integers or integer arrays.

    Attributes:
        name: `"parameters"`, `"flops"` or `"latency"` (seconds).
        fixed: What every shape costs: embeddings and head. An int if all terms are integers, else a float.
        enter: Cost of the bottleneck from a source width (`hidden_size` for the embeddings) to a layer of a width.
        layer: Cost of a layer of a width.
        leave: Cost of the bottleneck from the last kept layer's width back to `hidden_size`.
    """

    name: str
    fixed: float
    enter: Callable[[Any, Any], Any]
    layer: Callable[[Any], Any]
    leave: Callable[[Any], Any]


class HasChainCost(Protocol):
    """A cost that is made for one configuration, such as a `latency.LatencyTable`."""

    def chain_cost(self, config: SuperShaperConfig) -> ChainCost: ...


Cost = str | HasChainCost  # as users name it: "parameters", "flops", or a latency table


def resolve_cost(cost: Cost, config: SuperShaperConfig, sequence_length: int = 128) -> ChainCost:
    """Return the terms of a cost given as `"parameters"`, `"flops"` (of `sequence_length` tokens) or a latency table.

    Raises:
        ValueError: If the cost is none of these, or the table does not fit the configuration.
    """
    if not isinstance(cost, str):
        return cost.chain_cost(config)
    if cost not in ("parameters", "flops"):
        raise ValueError(f"Unknown cost {cost!r}. Allowed: 'parameters', 'flops', or a LatencyTable.")
    return parameter_cost(config) if cost == "parameters" else flops_cost(config, sequence_length)


def chain_cost(cost: ChainCost, hidden_size: int, shapes: np.ndarray) -> np.ndarray:
    """Return the (n,) costs of integer `shapes` (n, layers); a width of 0 passes the width before it on."""
    total = np.full(len(shapes), cost.fixed)  # integers where the terms are
    source = np.full(len(shapes), hidden_size, dtype=np.int64)
    for width in np.asarray(shapes, dtype=np.int64).T:
        kept = width > 0
        total += np.where(kept, cost.enter(source, width) + cost.layer(width), 0)
        source = np.where(kept, width, source)
    return total + cost.leave(source)


def parameter_cost(config: SuperShaperConfig) -> ChainCost:
    """Count every tensor that the masked-LM subnet stores once, tied weights once.

    The published figures of the 2021 paper leave out the decoder's bias and count the head's LayerNorm at the last
    layer's width, so they are slightly lower.
    """
    full, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    embeddings = (vocab + config.max_position_embeddings + config.type_vocab_size + 2) * full
    head = full * full + full + 2 * full + vocab + (0 if config.tie_word_embeddings else vocab * full)
    return ChainCost(
        "parameters",
        fixed=embeddings + head,
        enter=lambda source, width: source * width + width,
        layer=lambda width: 4 * (width * width + width) + 2 * ffn * width + ffn + width + 4 * width,
        leave=lambda width: width * full + full,
    )


def flops_cost(config: SuperShaperConfig, sequence_length: int) -> ChainCost:
    """Count the floating-point operations of one forward pass of the masked-LM subnet over one sequence.

    Two for each multiply-add of a matrix product, the masked-LM head on every position included; element-wise work
    (LayerNorm, softmax, activations, biases) is left out, as in `torch.utils.flop_counter`.
    """
    full, ffn, vocab, length = config.hidden_size, config.intermediate_size, config.vocab_size, sequence_length
    return ChainCost(
        "flops",
        fixed=2 * length * full * (full + vocab),
        enter=lambda source, width: 2 * length * source * width,
        layer=lambda width: 2 * length * (4 * width * width + 2 * ffn * width) + 4 * length * length * width,
        leave=lambda width: 2 * length * width * full,
    )


def training_flops(
    config: SuperShaperConfig, shapes: Sequence[Sequence[int]], sequences: int, length: int, labelled: int
) -> int:
    """Count the operations of training on one batch at each of `shapes`, forward and backward.

    The backward pass of a matrix product is two products of the same size. The masked-LM head runs on the labelled
    positions only. An outside teacher is not counted.

    Args:
        config: Of the supernet or subnet.
        shapes: The shapes trained on the batch, one hidden size per layer each.
        sequences: Sequences in the batch.
        length: Tokens of each, padding included.
        labelled: Labelled tokens in the batch.
    """
    full, cost = config.hidden_size, flops_cost(config, length)
    encoder = chain_cost(cost._replace(fixed=0), full, np.array(shapes)).sum()
    head = len(shapes) * 2 * labelled * full * (full + config.vocab_size)
    return 3 * int(sequences * encoder + head)
