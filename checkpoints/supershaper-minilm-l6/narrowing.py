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
"""How one linear map is narrowed and merged, and how a subnet is cut out of its supernet: tensors in, tensors out.

In reading order: `why_not_ordinary` says whether the weights of a layer are all that it computes with, `channels`,
`write` and `read` narrow one linear map, `merge` multiplies two bottlenecks. `subnet_tensors` stores what the encoder
would have used: `narrow_module` for the modules of a layer, `merge_bottlenecks` for the maps between layers. The
modules that are narrowed are in `elastic.py`. This file travels to the Hub beside `modeling_supershaper.py`.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_supershaper import SuperShaperConfig


def why_not_ordinary(layer: nn.Module) -> str | None:
    """Say what `layer` is, if it computes with more than its `weight` and `bias`; `None` for an ordinary layer.

    Adapters, quantised layers and hooks that prune keep a weight which they do not use alone: a part of it is not a
    part of what they compute. A layer that Accelerate has offloaded has its weight only while it is called.
    Parametrisations of `torch.nn.utils.parametrize`, DDP and FSDP2 leave layers ordinary,
    because their `weight` is the one that is used.
    """
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.forward not in (nn.Linear.forward, nn.LayerNorm.forward, nn.Embedding.forward):
        return name
    if "forward" in layer.__dict__ and not hasattr(layer, "_hf_hook"):  # Accelerate's hooks only move tensors
        return f"{name} with another forward method"
    for parameter in layer._parameters:
        if parameter not in ("weight", "bias"):
            return f"{name} with the parameter {parameter}"
    if layer.weight.is_meta and hasattr(layer, "_hf_hook"):
        return f"{name} whose weight Accelerate has offloaded"
    tensor = type(layer.weight)
    if hasattr(tensor, "__tensor_flatten__") and not tensor.__module__.startswith("torch.distributed."):
        return f"{name} with a weight of {tensor.__module__}.{tensor.__qualname__}"
    return None


def check_ordinary(layer: nn.Module, name: str = "a layer") -> None:
    """Raise TypeError if `layer`, which is called `name` in the message, is not one that can be narrowed or copied."""
    found = why_not_ordinary(layer)
    if found is not None:
        raise TypeError(
            f"Only ordinary layers are narrowed or cut, but {name} is {found}. Allowed are nn.Linear, nn.LayerNorm and "
            "nn.Embedding, also with torch.nn.utils.parametrize. Merge adapters into the weights first: model = "
            "peft_model.merge_and_unload(). Or call extract_subnet(shape) on the supernet before anything is replaced, "
            "and adapt, quantise, prune or offload the subnet."
        )


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


def write(weight: torch.Tensor, bias: torch.Tensor, writer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Narrow the outputs x of a linear map to their code z = x_kept + S x_rest, see `SuperShaperCode`.

    From weight (hidden_size, inputs), bias (hidden_size,) and writer S (w, hidden_size - w) follow the weight
    (w, inputs) and the bias (w,) of the narrow map.
    """
    width = len(writer)
    return weight[:width] + writer @ weight[width:], bias[:width] + writer @ bias[width:]


def read(
    weight: torch.Tensor, bias: torch.Tensor, writer: torch.Tensor, reader: torch.Tensor, reader_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Narrow the inputs x of a linear map to a code z, from which x_rest = R z + c and x_kept = z - S x_rest follow.

    From weight (outputs, hidden_size), bias (outputs,), writer S (w, hidden_size - w), reader R (hidden_size - w, w)
    and its bias c follow the weight (outputs, w) and the bias (outputs,) of the narrow map. Nothing is computed between
    this estimate and the map, so their product is exact.
    """
    width = len(writer)
    kept = weight[:, :width]
    rest = weight[:, width:] - kept @ writer
    return kept + rest @ reader, bias + rest @ reader_bias


def merge(
    out_weight: torch.Tensor, out_bias: torch.Tensor, in_weight: torch.Tensor, in_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply the map out of a layer (hidden_size, w) and the map into the next (v, hidden_size) into one w -> v map.

    The caller has narrowed both to the widths w and v of their layers. Nothing is computed between the two, so the
    product is exact: W = W_in W_out, b = W_in b_out + b_in.
    """
    return in_weight @ out_weight, in_weight @ out_bias + in_bias


def tensors_of(model: nn.Module) -> Callable[[str], torch.Tensor]:
    """Return a function that gives a tensor of `model` by name, for `subnet_tensors`.

    It raises TypeError, with the name of the layer, for a layer that is not an ordinary one.
    """

    def load(name: str) -> torch.Tensor:
        path, _, tensor = name.rpartition(".")
        layer = model.get_submodule(path)
        check_ordinary(layer, path)
        return getattr(layer, tensor)

    return load


def subnet_tensors(
    subnet: PreTrainedModel, config: SuperShaperConfig, shape: Sequence[int], load: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of every tensor that `subnet` stores, cut out of its supernet one linear map at a time.

    Args:
        subnet: An `empty_model` of the subnet, for the names of its tensors.
        config: The configuration of the supernet.
        shape: The shape as given to the supernet, dropped layers included.
        load: Returns a tensor of the supernet by name, from memory or from disk. It is called when a tensor is needed.
    """
    prefix = "encoder." if subnet.base_model is subnet else f"{subnet.base_model_prefix}.encoder."
    # Embeddings, pooler and head are not cut. Tied tensors are yielded once.
    for name in subnet.state_dict():
        if not name.startswith(prefix) and name not in subnet.all_tied_weights_keys:
            yield name, load(name)

    def load_inner(name: str) -> torch.Tensor:
        return load(f"{prefix}{name}")

    kept = [(layer, width) for layer, width in enumerate(shape) if width]
    for index, (layer, width) in enumerate(kept):
        for name, module in subnet.base_model.encoder.layer[index].named_modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                weight, bias = narrow_module(config, layer, width, name, load_inner)
                yield f"{prefix}layer.{index}.{name}.weight", weight
                yield f"{prefix}layer.{index}.{name}.bias", bias
    for name, weight, bias in merge_bottlenecks(config, kept, load_inner):
        yield f"{prefix}{name}.weight", weight
        yield f"{prefix}{name}.bias", bias


Load = Callable[[str], torch.Tensor]  # name in the encoder of the supernet -> tensor

# What each module of a layer reads and what it writes. States are narrowed to the code of this name if the width has
# codes of its own, and to their first channels if not. With head_slicing="per_head" every head is narrowed by itself.
# The inner states of the FFN are never narrowed. The weight of a LayerNorm has no inputs.
CODES, HEADS, INNER, NEXT = ("attention_code", "intermediate_code"), "heads", "inner states", "next layer"
READS_AND_WRITES: dict[str, tuple[str | None, str]] = {
    "attention.self.query": ("attention_code", HEADS),
    "attention.self.key": ("attention_code", HEADS),
    "attention.self.value": ("attention_code", HEADS),
    "attention.output.dense": (HEADS, "attention_code"),
    "attention.output.LayerNorm": (None, "intermediate_code"),
    "intermediate.dense": ("intermediate_code", INNER),
    "output.dense": (INNER, "intermediate_code"),
    "output.LayerNorm": (None, NEXT),
}


def narrow_module(
    config: SuperShaperConfig, layer: int, width: int, name: str, load: Load
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the linear map or LayerNorm `name` of a layer at `width`.

    The steps are those of `elastic_linear` and `elastic_layer_norm`, in the same order.
    """
    weight, bias = load(f"layer.{layer}.{name}.weight"), load(f"layer.{layer}.{name}.bias")
    reads, writes = READS_AND_WRITES[name]
    codes = CODES if config.has_own_maps(width) else ()
    heads = {HEADS: config.num_attention_heads} if config.head_slicing == "per_head" else {}

    def of_code(code: str, *tensors: str) -> list[torch.Tensor]:
        return [load(f"by_width.{layer}.{width}.{code}.{tensor}") for tensor in tensors]

    if reads is not None and reads != INNER and reads not in codes:
        weight = channels(weight, 1, width, heads.get(reads, 1))
    if writes in codes:
        coded, bias = write(weight, bias, *of_code(writes, "writer.weight"))
        is_layer_norm = reads is None
        weight = weight[:width] if is_layer_norm else coded  # of a LayerNorm, only the bias is coded
    elif writes != INNER:
        weight, bias = (channels(tensor, 0, width, heads.get(writes, 1)) for tensor in (weight, bias))
    if reads in codes:
        weight, bias = read(weight, bias, *of_code(reads, "writer.weight", "reader.weight", "reader.bias"))
    if name == "attention.self.query" and config.full_head_scale:  # a subnet scales scores by its own head size
        factor = (width / config.hidden_size) ** 0.5
        weight, bias = weight * factor, bias * factor
    return weight, bias


def merge_bottlenecks(
    config: SuperShaperConfig, kept: Sequence[tuple[int, int]], load: Load
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the bottlenecks: into the first kept layer, merged ones between kept layers, and out of the last one.

    Args:
        config: The configuration of the supernet.
        kept: Layer and width of each kept layer.
        load: Returns a tensor of the supernet's encoder by name.

    Yields:
        The name in the subnet's encoder, weight and bias.
    """
    exit = None  # the map out of the layer before: weight (hidden_size, w) and bias (hidden_size,)
    for index, (layer, width) in enumerate(kept):
        own = f"by_width.{layer}.{width}" if config.has_own_maps(width) else None
        weight, bias = load(f"input_bottleneck.{layer}.weight"), load(f"input_bottleneck.{layer}.bias")
        if own is None:
            weight, bias = weight[:width], bias[:width]
        else:
            weight, bias = write(weight, bias, load(f"{own}.attention_code.writer.weight"))
        if exit is not None:
            weight, bias = merge(*exit, weight, bias)
        yield f"input_bottleneck.{index}", weight, bias
        name = f"output_bottleneck.{layer}" if own is None else f"{own}.output_bottleneck"
        exit = load(f"{name}.weight")[:, :width], load(f"{name}.bias")
    assert exit is not None
    yield "output_bottleneck.0", *exit
