"""Importance of channels: the most important channels come first, because a narrowed layer keeps the first ones.

`channel_importances` measures how much the loss depends on each channel of a supernet, and `reorder_channels` sorts
every layer by it. The full supernet computes the same as before, and narrow shapes consist of the channels that matter.

Imagine that each channel is multiplied by a gate g = 1. The importance of the channel is (dL/dg)^2, averaged over
batches: how fast the loss L changes when the gate closes (Molchanov et al. 2019, arXiv 1906.10771; for heads Michel et
al. 2019, arXiv 1905.10650). A gate on an output of a linear map multiplies a row of its weight and an entry of its
bias, and a gate on an input multiplies a column. So dL/dg is the sum of parameter times gradient over these entries.
One backward pass gives it for all channels, and no gate has to be built.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..model.modeling_supershaper import IGNORE_INDEX


Importances = dict[str, torch.Tensor]


def reorder_channels(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[Importances]:
    """Sort the channels of every layer by importance, most important first. The full supernet computes the same.

    Hidden channels and FFN neurons are sorted as a whole, and attention channels within their head. With
    `head_slicing="prefix"`, where a narrow layer keeps the channels of the first heads, the heads are sorted as well.

    Call it once, after `from_bert` and before super pre-training, because gradients and the state of an optimiser stay
    in the old order. While the bottlenecks are still identities, the narrowest shapes may have a slightly higher loss
    than before, because neighbouring layers then keep different channels. After some training their loss is lower.

    Args:
        model: A supernet with a head. It is changed in place.
        batches: As for `channel_importances`.

    Returns:
        The importances that decided the order, as from `channel_importances`, in the old order.

    Raises:
        ValueError: In the same cases as in `channel_importances`. The model is then unchanged.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> ids = torch.arange(24).view(2, 12)
        >>> importances = reorder_channels(SuperShaperForMaskedLM(config), [{"input_ids": ids, "labels": ids}])
        >>> [importance["hidden"].shape for importance in importances]
        [torch.Size([96]), torch.Size([96])]
    """
    importances = channel_importances(model, batches)
    encoder = model.base_model.encoder
    for index, importance in enumerate(importances):
        entry, layer, exit = encoder.input_bottleneck[index], encoder.layer[index], encoder.output_bottleneck[index]
        attention, attended = layer.attention.self, layer.attention.output
        hidden = descending(importance["hidden"])
        for module in (entry, attended.dense, attended.LayerNorm, layer.output.dense, layer.output.LayerNorm):
            permute(module, 0, hidden)
        for module in (attention.query, attention.key, attention.value, layer.intermediate.dense, exit):
            permute(module, 1, hidden)

        # A score sums the products of query and key channels, so these two need the same order. Only
        # `attended.dense` reads the value channels.
        heads = importance["heads"]
        if model.config.head_slicing == "per_head":  # a narrow layer keeps a part of every head: their order stays
            heads = torch.zeros_like(heads)
        scores = descending_in_heads(importance["query_key"], heads)
        values = descending_in_heads(importance["value"], heads)
        permute(attention.query, 0, scores)
        permute(attention.key, 0, scores)
        permute(attention.value, 0, values)
        permute(attended.dense, 1, values)

        neurons = descending(importance["neurons"])
        permute(layer.intermediate.dense, 0, neurons)
        permute(layer.output.dense, 1, neurons)
    return importances


def channel_importances(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[Importances]:
    """Measure how much the loss depends on each channel of each layer, without changing the model.

    The model runs in evaluation mode. Afterwards it has the mode and the gradients that it had before.

    Args:
        model: A supernet with a head.
        batches: Keyword arguments of the forward pass, labels among them, on any device. Many small batches are better
            than a few large ones, because gradients of both signs cancel within a batch. A batch without a labelled
            token is skipped.

    Returns:
        For each layer a dictionary of mean squared gate gradients, on the model's device:

        * `hidden` (hidden_size,): one gate for the input bottleneck and both LayerNorms, because a narrow layer loses
          a channel in all three;
        * `query_key` (hidden_size,): a gate on the product of a query and a key channel in the attention scores;
        * `value` (hidden_size,): a gate on a channel of the values that attention returns;
        * `heads` (num_attention_heads,): one gate for all values of a head;
        * `neurons` (intermediate_size,): a gate on an activation of the FFN.

    Raises:
        ValueError: If the model is a subnet, no batch has a label or gives a loss, or an importance is not finite.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> ids = torch.arange(24).view(2, 12)
        >>> first, second = channel_importances(SuperShaperForMaskedLM(config), [{"input_ids": ids, "labels": ids}])
        >>> first["heads"].shape
        torch.Size([4])
    """
    if model.config.merged_bottlenecks:
        raise ValueError(
            f"This is a subnet with fixed hidden_sizes={model.config.hidden_sizes}: its channels are already cut. "
            "Reorder the supernet before extract_subnet."
        )
    used, totals = 0, list[Importances]()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches:
            if "labels" in batch and (batch["labels"] == IGNORE_INDEX).all():
                continue
            squares = [{name: g**2 for name, g in layer.items()} for layer in gate_gradients(model, batch)]
            if used:
                squares = [{name: old[name] + new[name] for name in new} for old, new in zip(totals, squares)]
            totals = squares
            used += 1
    finally:
        for module, training in modes:
            module.training = training
    if not used:
        raise ValueError("There is no batch with a label, and importance is measured on the loss. Give at least one.")
    importances = [{name: total / used for name, total in layer.items()} for layer in totals]
    for index, layer in enumerate(importances):
        for name, importance in layer.items():
            if not importance.isfinite().all():
                raise ValueError(
                    f"The importance of {name} in layer {index} is not finite: a loss or a gradient is infinite or not "
                    "a number. Check weights and labels, and measure in float32."
                )
    return importances


def gate_gradients(model: Any, batch: Mapping[str, torch.Tensor]) -> list[Importances]:
    """Return dL/dg of every gate of every layer, named as by `channel_importances`, for the loss L on one batch."""
    # Tensors that share the memory of the parameters. They have gradients also where the parameters are frozen, and
    # the parameters' own .grad stays as it is.
    encoder = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if "encoder." in name}
    batch = {name: value.to(model.device) for name, value in batch.items()}
    with torch.enable_grad():
        output = torch.func.functional_call(model, encoder, kwargs=batch)
    if getattr(output, "loss", None) is None:
        raise ValueError(
            f"{type(model).__name__} gives no loss on a batch of {', '.join(batch)}, and importance is measured on it. "
            "Add labels to the batches, and use a model with a head."
        )
    gradients = torch.autograd.grad(output.loss, list(encoder.values()))
    products = {
        name.partition("encoder.")[2]: parameter.detach().float() * gradient.float()
        for (name, parameter), gradient in zip(encoder.items(), gradients)
    }

    def of_outputs(module: str) -> torch.Tensor:
        weight, bias = products[f"{module}.weight"], products[f"{module}.bias"]
        return weight.reshape(len(bias), -1).sum(dim=1) + bias

    def of_inputs(module: str) -> torch.Tensor:
        return products[f"{module}.weight"].sum(dim=0)

    layers = []
    for index in range(model.config.num_hidden_layers):
        layer = f"layer.{index}"
        hidden = (f"input_bottleneck.{index}", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm")
        value = of_inputs(f"{layer}.attention.output.dense")
        layers.append(
            {
                "hidden": torch.stack([of_outputs(module) for module in hidden]).sum(dim=0),
                "query_key": of_outputs(f"{layer}.attention.self.query"),  # a gate on the key does the same
                "value": value,
                "heads": value.view(model.config.num_attention_heads, -1).sum(dim=1),
                "neurons": of_inputs(f"{layer}.output.dense"),
            }
        )
    return layers


def descending(importance: torch.Tensor) -> torch.Tensor:
    """Return the order from the highest to the lowest along the last axis. Equal ones keep their order."""
    return importance.argsort(dim=-1, descending=True, stable=True)


def descending_in_heads(importance: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Return the order of attention channels: by `heads` (num_heads,) first, by `importance` (width,) within each."""
    importance = importance.view(len(heads), -1)
    first = torch.arange(importance.numel(), device=importance.device).view_as(importance)[:, :1]
    return (first + descending(importance))[descending(heads)].flatten()


@torch.no_grad()
def permute(module: nn.Linear | nn.LayerNorm, axis: int, order: torch.Tensor) -> None:
    """Reorder the outputs (`axis` 0: rows and bias) or the inputs (`axis` 1: columns) of a module in place."""
    for parameter in (module.weight, module.bias) if axis == 0 else (module.weight,):
        parameter.copy_(parameter.index_select(axis, order))
