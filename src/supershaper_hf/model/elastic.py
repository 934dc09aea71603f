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
"""The elastic encoder: how the modules of a layer work at a narrow width, and the encoder that runs a shape.

A layer works at the width of its input: it uses the first channels of its own parameters. So the bottlenecks between
the layers decide the shape of a forward pass, and no module remembers it. Module and parameter names are those of BERT,
plus `encoder.input_bottleneck` and `encoder.output_bottleneck`.

With `config.bottlenecks="by_width"`, every layer also has a few modules that only one narrow width uses: see
`SuperShaperNarrowWidth`. They disappear in a subnet, which stores their products with the weights beside them.

What happens to the tensors is in `narrowing.py`. In reading order: `elastic_linear` and `elastic_layer_norm`, the
layer, and the encoder. This file travels to the Hub beside `modeling_supershaper.py`.

Source: SuperShaper, arXiv 2110.04711.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_supershaper import SuperShaperConfig
from .narrowing import channels, check_ordinary, merge, read, why_not_ordinary, write


# How many tokens each thread of a CPU takes at a time, see `in_pieces`. Anything from 256 to 512 is equally fast.
TOKENS_AT_A_TIME = 256


class SuperShaperCode(nn.Module):
    """How a layer of width w stands for a state x of all `hidden_size` channels: by a linear code of w channels.

    The code is z = x_kept + S x_rest: the first w channels, to which `writer` adds what is known of the others. From
    it, `reader` estimates x_rest = R z + c, and x_kept = z - S x_rest. All three start at 0: then the code is the first
    w channels, and the others count as 0, as in a supernet with shared bottlenecks.
    """

    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        rest = config.hidden_size - width
        self.writer = SuperShaperCodeMap(rest, width, bias=False)
        self.reader = SuperShaperCodeMap(width, rest)

    def write(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Narrow the outputs of a linear map to this code."""
        check_ordinary(self.writer)
        return write(weight, bias, self.writer.weight)

    def read(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Narrow the inputs of a linear map to this code."""
        check_ordinary(self.writer)
        check_ordinary(self.reader)
        return read(weight, bias, self.writer.weight, self.reader.weight, self.reader.bias)


class SuperShaperCodeMap(nn.Linear):
    """A linear map between kept and other channels. It starts at 0."""


def in_pieces(
    function: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, *modules: nn.Module
) -> torch.Tensor:
    """Return `function(states)`, for a function that treats every token of `states` (batch, length, w) by itself.

    Inference on a CPU computes some hundred tokens at a time. The inner states of an FFN, which are 50 MB for 32
    sequences of 128 tokens at BERT-base size, then stay in the cache, and matrix products whose width is no multiple of
    8 are not slowed down, as they are with thousands of rows. Training computes all tokens at once, because the random
    numbers of dropout must not depend on the number of threads, and so do `modules` that have hooks: a hook sees one
    tensor for all tokens.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # then the number of tokens may be a symbol
    if traced or torch.is_grad_enabled() or states.ndim != 3 or states.device.type != "cpu":
        return function(states)
    batch, length, _ = states.shape
    pieces = -(-batch * length // (TOKENS_AT_A_TIME * torch.get_num_threads()))
    if pieces < 2 or any(part.training or is_hooked(part) for module in modules for part in module.modules()):
        return function(states)
    return torch.cat([function(piece) for piece in states.flatten(0, 1).chunk(pieces)]).view(batch, length, -1)


def is_hooked(module: nn.Module) -> bool:
    """Return whether calling `module` runs more than its class says. Accelerate's hooks replace the forward method."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def elastic_linear(
    layer: nn.Linear,
    inputs: torch.Tensor,
    width: int | None = None,
    in_heads: int = 1,
    out_heads: int = 1,
    reads: SuperShaperCode | None = None,
    writes: SuperShaperCode | None = None,
) -> torch.Tensor:
    """Apply the part of `layer` that maps `inputs` (..., in_width) to (..., width); `width=None` keeps every output.

    Inputs and outputs are the first channels, or a code of all channels if `reads` or `writes` is given. A layer that
    is not narrowed is called as a module, so that replacements of `nn.Linear` (quantised ones, adapters) work in
    subnets and at the full shape.

    Raises:
        TypeError: If a layer that is to be narrowed was replaced.
    """
    in_width = inputs.shape[-1]
    width = layer.out_features if width is None else width
    if (in_width, width) == (layer.in_features, layer.out_features):
        return in_pieces(layer, inputs, layer)
    check_ordinary(layer)
    weight, bias = layer.weight, layer.bias
    if reads is None:
        weight = channels(weight, 1, in_width, in_heads)
    if writes is None:
        weight, bias = channels(weight, 0, width, out_heads), channels(bias, 0, width, out_heads)
    else:
        weight, bias = writes.write(weight, bias)
    if reads is not None:
        weight, bias = reads.read(weight, bias)
    return in_pieces(lambda piece: nn.functional.linear(piece, weight, bias), inputs)


def elastic_layer_norm(norm: nn.LayerNorm, inputs: torch.Tensor, writes: SuperShaperCode | None = None) -> torch.Tensor:
    """Normalise `inputs` (..., width) over its own width, with the first `width` weights and biases of `norm`.

    If its outputs are a code, the bias is coded too.

    Raises:
        TypeError: If a LayerNorm that is to be narrowed was replaced.
    """
    width = inputs.shape[-1]
    if (width,) == norm.normalized_shape:
        return norm(inputs)
    check_ordinary(norm)
    weight = norm.weight[:width]
    bias = norm.bias[:width] if writes is None else writes.write(norm.weight, norm.bias)[1]
    return nn.functional.layer_norm(inputs, (width,), weight, bias, norm.eps)


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

    def scaling(self, width: int) -> float:
        """Return the factor of the attention scores at `width`."""
        scaled_width = self.config.hidden_size if self.config.full_head_scale else width
        return (scaled_width // self.num_heads) ** -0.5

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        code: SuperShaperCode | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, width = hidden_states.shape

        def project(layer: nn.Linear) -> torch.Tensor:
            projected = elastic_linear(layer, hidden_states, width, out_heads=self.sliced_heads, reads=code)
            return projected.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)

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
            scaling=self.scaling(width),
            **kwargs,
        )
        return context.reshape(batch, length, width).contiguous(), weights


class SuperShaperResidual(nn.Module):
    """Both halves of a post-LN layer end in this: LayerNorm(residual + dropout(dense(inputs))).

    The outputs have the width of `residual` (batch, length, w). `code` is that of the residual, and `next_code` that of
    the outputs.
    """

    def __init__(self, config: SuperShaperConfig, in_features: int, width: int):
        super().__init__()
        self.dense = nn.Linear(in_features, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        inputs: torch.Tensor,
        residual: torch.Tensor,
        in_heads: int = 1,
        code: SuperShaperCode | None = None,
        next_code: SuperShaperCode | None = None,
    ) -> torch.Tensor:
        outputs = elastic_linear(self.dense, inputs, residual.shape[-1], in_heads=in_heads, writes=code)
        return elastic_layer_norm(self.LayerNorm, residual + self.dropout(outputs), writes=next_code)


class SuperShaperAttention(nn.Module):
    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        self.self = SuperShaperSelfAttention(config, width)
        self.output = SuperShaperResidual(config, width, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        narrow: "SuperShaperNarrowWidth | None" = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        code, next_code = (None, None) if narrow is None else (narrow.attention_code, narrow.intermediate_code)
        context, _ = self.self(hidden_states, attention_mask, code, **kwargs)
        return self.output(context, hidden_states, self.self.sliced_heads, code, next_code)


class SuperShaperIntermediate(nn.Module):
    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(width, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, code: SuperShaperCode | None = None) -> torch.Tensor:
        return self.activation(elastic_linear(self.dense, hidden_states, reads=code))


class SuperShaperLayer(GradientCheckpointingLayer):
    """A post-LN BERT layer at the width of its input: (batch, length, w) -> (batch, length, w).

    `narrow` holds what only this width of the layer has, in a supernet with `bottlenecks="by_width"`.
    """

    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        self.attention = SuperShaperAttention(config, width)
        self.intermediate = SuperShaperIntermediate(config, width)
        self.output = SuperShaperResidual(config, config.intermediate_size, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        narrow: "SuperShaperNarrowWidth | None" = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        code = None if narrow is None else narrow.intermediate_code

        def feed_forward(attended: torch.Tensor) -> torch.Tensor:
            return self.output(self.intermediate(attended, code), attended, code=code)

        attended = self.attention(hidden_states, attention_mask, narrow, **kwargs)
        if code is not None:  # it is multiplied with the weights, once for all tokens
            return feed_forward(attended)
        return in_pieces(feed_forward, attended, self.intermediate, self.output)


def bottleneck(in_features: int, out_features: int) -> nn.Linear:
    """Return the linear map into or out of a layer. It starts as the identity, so that a new supernet equals its BERT.

    It is an `nn.Linear` and no class of its own, because `torch.ao.quantization` replaces layers of exact classes only.
    """
    layer = nn.Linear(in_features, out_features)
    layer.starts_as_identity = True
    return layer


class SuperShaperNarrowWidth(nn.Module):
    """What a layer has for one of its narrow widths alone: the codes of its two halves, and an output bottleneck.

    `attention_code` stands for the state that the attention reads and adds to, `intermediate_code` for the one that the
    FFN reads and adds to. `output_bottleneck` leads from this width to hidden_size.
    """

    def __init__(self, config: SuperShaperConfig, width: int):
        super().__init__()
        self.attention_code = SuperShaperCode(config, width)
        self.intermediate_code = SuperShaperCode(config, width)
        self.output_bottleneck = bottleneck(width, config.hidden_size)


class SuperShaperEncoder(nn.Module):
    """The layers and the bottlenecks between them.

    In a supernet every layer has an input bottleneck (hidden_size -> w) and an output bottleneck (w -> hidden_size). In
    a subnet they are merged: input bottleneck i maps the width of layer i - 1 to that of layer i, and one output
    bottleneck after the last layer leads back to hidden_size.

    With `bottlenecks="by_width"`, `by_width[i][str(w)]` is the `SuperShaperNarrowWidth` of layer i at width w. The full
    width needs none.
    """

    def __init__(self, config: SuperShaperConfig):
        super().__init__()
        self.config = config
        self.merged_bottlenecks = config.merged_bottlenecks
        full, widths = config.hidden_size, config.hidden_sizes
        sources = [full, *widths[:-1]] if config.merged_bottlenecks else [full] * len(widths)
        ends = widths[-1:] if config.merged_bottlenecks else widths
        self.input_bottleneck = nn.ModuleList(bottleneck(source, width) for source, width in zip(sources, widths))
        self.layer = nn.ModuleList(SuperShaperLayer(config, width) for width in widths)
        self.output_bottleneck = nn.ModuleList(bottleneck(width, full) for width in ends)
        if config.bottlenecks == "by_width":
            narrow_widths = (config.width_choices or [])[:-1]
            self.by_width = nn.ModuleList(
                nn.ModuleDict({str(width): SuperShaperNarrowWidth(config, width) for width in narrow_widths})
                for _ in widths
            )

    def narrow(self, layer: int, width: int) -> SuperShaperNarrowWidth | None:
        """Return what layer `layer` has for `width` alone; `None` where it has nothing."""
        return self.by_width[layer][str(width)] if self.config.has_own_maps(width) else None

    def exit(self, layer: int, width: int) -> nn.Linear:
        """Return the output bottleneck of layer `layer` at `width`: its own, or the shared one, which is narrowed."""
        narrow = self.narrow(layer, width)
        shared = self.output_bottleneck[-1 if self.merged_bottlenecks else layer]
        return shared if narrow is None else narrow.output_bottleneck

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
            hidden_states = self.layer[index](hidden_states, attention_mask, self.narrow(index, width), **kwargs)
            previous = index
        return self.leave(previous, hidden_states)

    def leave(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map the output of layer `layer`, (batch, length, w), to (batch, length, hidden_size)."""
        return elastic_linear(self.exit(layer, hidden_states.shape[-1]), hidden_states)

    def _enter(self, hidden_states: torch.Tensor, previous: int | None, index: int, width: int) -> torch.Tensor:
        """Map the output of layer `previous` (`None`: the embeddings) to the input of layer `index` at `width`."""
        entry, narrow = self.input_bottleneck[index], self.narrow(index, width)
        code = None if narrow is None else narrow.attention_code
        if previous is None or self.merged_bottlenecks:
            return elastic_linear(entry, hidden_states, width, writes=code)
        source, full = hidden_states.shape[-1], entry.in_features
        exit = self.exit(previous, source)
        tokens = hidden_states.numel() // source
        # Take the way with fewer multiplications. Merging costs one product of (width, full) and (full, source). Each
        # token then goes from `source` to `width` directly instead of through `full`. Replaced layers have no product.
        # An exported program has one way for all sizes: asking for the number of tokens would fix it.
        exporting = torch.compiler.is_exporting()
        cheaper = not exporting and source * width * (full + tokens) < tokens * full * (source + width)
        if cheaper and why_not_ordinary(entry) is None and why_not_ordinary(exit) is None:
            kept = entry.weight[:width], entry.bias[:width]
            into = kept if code is None else code.write(entry.weight, entry.bias)
            return nn.functional.linear(hidden_states, *merge(exit.weight[:, :source], exit.bias, *into))
        return elastic_linear(entry, elastic_linear(exit, hidden_states), width, writes=code)
