"""Which model was measured on which data: hashes that a records file keeps, so that nothing else is added to it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


# The settings of a configuration that decide what a model computes, besides the weights.
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


def fingerprint_encoder(model: PreTrainedModel) -> str:
    """Return the fingerprint of what decides a model's last hidden states: neither a head nor a pooler counts."""
    encoder: Any = model.base_model
    return fingerprint_model(encoder, skipped="pooler.")


def fingerprint_model(model: PreTrainedModel, skipped: str | None = None) -> str:
    """Return the SHA-256 of what decides a model's predictions: its sizes, and every weight with its dtype.

    It does not depend on the device, nor on how many processes FSDP (version 2) shards the weights over. With FSDP all
    processes have to call it. It gathers one tensor at a time, so it needs memory for the largest one only. Tensors
    whose names begin with `skipped` do not count.
    """
    settings = {name: getattr(model.config, name, None) for name in SIZES}
    if getattr(model.config, "full_head_scale", False):  # named only if it is on, because it is newer than fingerprints
        settings["full_head_scale"] = True
    digest = hashlib.sha256(json.dumps(settings).encode())
    tensors = model.state_dict()
    for name in sorted(tensors.keys() - model.all_tied_weights_keys):
        tensor = tensors[name]
        if skipped is not None and name.startswith(skipped):
            continue
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
