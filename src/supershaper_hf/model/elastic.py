# Copyright 2026 The supershaper-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The elastic encoder: how a layer is narrowed, how bottlenecks merge, and how a subnet is cut out of its supernet.

A layer works at the width of its input: it uses the first channels of its own parameters. So the bottlenecks between
the layers decide the shape of a forward pass, and no module remembers it. Module and parameter names are those of BERT,
plus `encoder.input_bottleneck` and `encoder.output_bottleneck`.

In reading order: `channels` and `elastic_linear` narrow one linear map, and `merge` multiplies two bottlenecks. Then
come the layer, the encoder that runs a shape, and `subnet_tensors`, which stores what the encoder would have used.
Source: SuperShaper, arXiv 2110.04711. This file travels to the Hub beside `modeling_supershaper.py`.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_supershaper import SuperShaperConfig


def channels(tensor: torch.Tensor, axis: int, width: int, num_heads: int = 1) -> torch.Tensor:
    """Return the channels that a layer keeps along `axis` at `width`: the first `width / num_heads` of every head.

    With one head these are the first `width` channels, as a view.
    """
    if tensor.shape[axis] == width:
        return tensor
    if num_heads == 1:
        return tensor.narrow(axis, 0, width)
    heads = tensor.unflatten(axis, (num_heads, -1))
    return heads.narrow(axis + 1, 0, width // num_heads).flatten(axis, axis + 1)


def elastic_linear(
    layer: nn.Linear, inputs: torch.Tensor, width: int | None = None, in_heads: int = 1, out_heads: int = 1
) -> torch.Tensor:
    """Apply the part of `layer` that maps `inputs` (..., in_width) to (..., width); `width=None` keeps every output.

    A layer that is not narrowed is called as a module, so that replacements of `nn.Linear` (quantised ones, adapters)
    work in subnets.
    """
    in_width = inputs.shape[-1]
    width = layer.out_features if width is None else width
    if (in_width, width) == (layer.in_features, layer.out_features):
        return layer(inputs)
    weight = channels(channels(layer.weight, 0, width, out_heads), 1, in_width, in_heads)
    return nn.functional.linear(inputs, weight, channels(layer.bias, 0, width, out_heads))


def elastic_layer_norm(norm: nn.LayerNorm, inputs: torch.Tensor) -> torch.Tensor:
    """Normalise `inputs` (..., width) over its own width, with the first `width` weights and biases of `norm`."""
    width = inputs.shape[-1]
    if (width,) == norm.normalized_shape:
        return norm(inputs)
    return nn.functional.layer_norm(inputs, (width,), norm.weight[:width], norm.bias[:width], norm.eps)


def merge(
    out_weight: torch.Tensor, out_bias: torch.Tensor, in_weight: torch.Tensor, in_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the map out of a layer (hidden_size, w) and the map into the next (v, hidden_size) into one w -> v map.

    The caller has narrowed both to the widths w and v of their layers. Nothing is computed between the two, so the
    product is exact: W = W_in W_out, b = W_in b_out + b_in.
    """
    return in_weight @ out_weight, in_weight @ out_bias + in_bias


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SuperShaperSelfAttention(nn.Module):
    """Multi-head attention at the width of its input: always `num_attention_heads` heads of size width / heads."""

    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.sliced_heads = config.num_attention_heads if config.head_slicing == "per_head" else 1
        self.is_causal = False
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, width = hidden_states.shape
        head_size = width // self.num_heads

        def project(layer: nn.Linear) -> torch.Tensor:
            projected = elastic_linear(layer, hidden_states, width, out_heads=self.sliced_heads)
            return projected.view(batch, length, self.num_heads, head_size).transpose(1, 2)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, weights = attention_interface(
            self,
            project(self.query),
            project(self.key),
            project(self.value),
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=head_size**-0.5,
            **kwargs,
        )
        return context.reshape(batch, length, width).contiguous(), weights


class SuperShaperResidual(nn.Module):
    """Both halves of a post-LN layer end in this: LayerNorm(residual + dropout(dense(inputs))).

    The outputs have the width of `residual` (batch, length, w).
    """

    def __init__(self, config: SuperShaperConfig, in_features: int, width: int):
        super().__init__()
        self.dense = nn.Linear(in_features, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs: torch.Tensor, residual: torch.Tensor, in_heads: int = 1) -> torch.Tensor:
        outputs = elastic_linear(self.dense, inputs, residual.shape[-1], in_heads=in_heads)
        return elastic_layer_norm(self.LayerNorm, residual + self.dropout(outputs))


class SuperShaperAttention(nn.Module):
    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        self.self = SuperShaperSelfAttention(config, width)
        self.output = SuperShaperResidual(config, width, width)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        context, _ = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(context, hidden_states, in_heads=self.self.sliced_heads)


class SuperShaperIntermediate(nn.Module):
    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(elastic_linear(self.dense, hidden_states))


class SuperShaperLayer(GradientCheckpointingLayer):
    """A post-LN BERT layer at the width of its input: (batch, length, w) -> (batch, length, w)."""

    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        self.attention = SuperShaperAttention(config, width)
        self.intermediate = SuperShaperIntermediate(config, width)
        self.output = SuperShaperResidual(config, config.intermediate_size, width)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        attended = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(self.intermediate(attended), attended)


class SuperShaperBottleneck(nn.Linear):
    """The linear map into or out of a layer. It starts as the identity, so that a new supernet equals its BERT."""


class SuperShaperEncoder(nn.Module):
    """The layers and the bottlenecks between them.

    In a supernet every layer has an input bottleneck (hidden_size -> w) and an output bottleneck (w -> hidden_size). In
    a subnet they are merged: input bottleneck i maps the width of layer i - 1 to that of layer i, and one output
    bottleneck after the last layer leads back to hidden_size.
    """

    def __init__(self, config: SuperShaperConfig):
        super().__init__()
        self.merged_bottlenecks = config.merged_bottlenecks
        full, widths = config.hidden_size, config.hidden_sizes
        sources = [full, *widths[:-1]] if config.merged_bottlenecks else [full] * len(widths)
        ends = widths[-1:] if config.merged_bottlenecks else widths
        self.input_bottleneck = nn.ModuleList(
            SuperShaperBottleneck(source, width) for source, width in zip(sources, widths)
        )
        self.layer = nn.ModuleList(SuperShaperLayer(config, width) for width in widths)
        self.output_bottleneck = nn.ModuleList(SuperShaperBottleneck(width, full) for width in ends)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        shape: Sequence[int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        previous = None
        for index, width in enumerate(shape):
            if width == 0:
                continue
            hidden_states = self._enter(hidden_states, previous, index, width)
            hidden_states = self.layer[index](hidden_states, attention_mask, **kwargs)
            previous = index
        last = self.output_bottleneck[-1 if self.merged_bottlenecks else previous]
        return elastic_linear(last, hidden_states)

    def _enter(self, hidden_states: torch.Tensor, previous: int | None, index: int, width: int) -> torch.Tensor:
        """Map the output of layer `previous` (`None`: the embeddings) to the input of layer `index` at `width`."""
        entry = self.input_bottleneck[index]
        if previous is None or self.merged_bottlenecks:
            return elastic_linear(entry, hidden_states, width)
        exit = self.output_bottleneck[previous]
        source, full = hidden_states.shape[-1], entry.in_features
        tokens = hidden_states.numel() // source
        # Take the way with fewer multiplications. Merging costs one product of (width, full) and (full, source). Each
        # token then goes from `source` to `width` directly instead of through `full`.
        if source * width * (full + tokens) < tokens * full * (source + width):
            weight, bias = merge(exit.weight[:, :source], exit.bias, entry.weight[:width], entry.bias[:width])
            return nn.functional.linear(hidden_states, weight, bias)
        return elastic_linear(entry, elastic_linear(exit, hidden_states), width)


def subnet_tensors(
    subnet: PreTrainedModel, shape: Sequence[int], load: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of every tensor that `subnet` stores, cut out of its supernet one at a time.

    Args:
        subnet: An `empty_model` of the subnet, for the names and the sizes of its tensors.
        shape: The shape as given to the supernet, dropped layers included.
        load: Returns a tensor of the supernet by name, from memory or from disk. It is called when a tensor is needed.
    """
    prefix = "encoder." if subnet.base_model is subnet else f"{subnet.base_model_prefix}.encoder."
    yield from whole_tensors(subnet, prefix, load)
    yield from layer_tensors(subnet, shape, prefix, load)
    yield from bottleneck_tensors(shape, prefix, load)


def whole_tensors(
    subnet: PreTrainedModel, encoder_prefix: str, load: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors outside the encoder (embeddings, pooler, head), uncut. Tied tensors are yielded once."""
    for name in subnet.state_dict():
        if not name.startswith(encoder_prefix) and name not in subnet.all_tied_weights_keys:
            yield name, load(name)


def layer_tensors(
    subnet: PreTrainedModel, shape: Sequence[int], encoder_prefix: str, load: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the kept layers, each cut along every axis to the size that it has in `subnet`."""
    per_head = subnet.config.head_slicing == "per_head"
    kept = [layer for layer, width in enumerate(shape) if width]
    for index, (layer, module) in enumerate(zip(kept, subnet.base_model.encoder.layer)):
        for name, target in module.state_dict().items():
            # The axis of the query, key and value channels, which are divided into heads.
            head_axis = (
                0 if name.startswith("attention.self.") else 1 if name == "attention.output.dense.weight" else None
            )
            tensor = load(f"{encoder_prefix}layer.{layer}.{name}")
            for axis, width in enumerate(target.shape):
                cut_heads = subnet.config.num_attention_heads if per_head and axis == head_axis else 1
                tensor = channels(tensor, axis, width, cut_heads)
            yield f"{encoder_prefix}layer.{index}.{name}", tensor


def bottleneck_tensors(
    shape: Sequence[int], encoder_prefix: str, load: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the bottlenecks: into the first kept layer, merged ones between kept layers, and out of the last one."""
    kept = [layer for layer, width in enumerate(shape) if width]
    for index, layer in enumerate(kept):
        entry = f"{encoder_prefix}input_bottleneck.{layer}"
        weight, bias = load(f"{entry}.weight")[: shape[layer]], load(f"{entry}.bias")[: shape[layer]]
        if index > 0:
            previous = kept[index - 1]
            exit = f"{encoder_prefix}output_bottleneck.{previous}"
            weight, bias = merge(load(f"{exit}.weight")[:, : shape[previous]], load(f"{exit}.bias"), weight, bias)
        yield f"{encoder_prefix}input_bottleneck.{index}.weight", weight
        yield f"{encoder_prefix}input_bottleneck.{index}.bias", bias
    last = f"{encoder_prefix}output_bottleneck.{kept[-1]}"
    yield f"{encoder_prefix}output_bottleneck.0.weight", load(f"{last}.weight")[:, : shape[kept[-1]]]
    yield f"{encoder_prefix}output_bottleneck.0.bias", load(f"{last}.bias")
