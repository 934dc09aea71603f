"""From a checkpoint of the 2021 repository, iitm-sysdl/SuperShaper, to a supernet."""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..model.configuration_supershaper import SuperShaperConfig
from .bert import load_tensors, report_loading


def from_original(
    model_class: type,
    source: str | Path | Mapping[str, torch.Tensor],
    config: SuperShaperConfig,
    output_loading_info: bool = False,
) -> Any:
    """Make a supernet from a checkpoint of the 2021 repository, iitm-sysdl/SuperShaper.

    Args:
        model_class: The SuperShaper head to make.
        source: Its `pytorch_model.bin`, or the state dict.
        config: The supernet's configuration; the checkpoint holds none that can be trusted.
        output_loading_info: As in `from_bert`.

    Raises:
        OSError: If the file is truncated or is no checkpoint of PyTorch.
        ValueError: If a tensor's size does not fit `config`.
    """
    if isinstance(source, Mapping):
        state = source
    else:
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except (RuntimeError, UnpicklingError, EOFError, OSError) as error:
            raise OSError(
                f"{source} is truncated or is not a state dict saved by torch.save ({error}). Copy the file again."
            ) from error
    tensors = {_modern_name(name): tensor for name, tensor in state.items()}
    tensors.pop("bert.embeddings.position_ids", None)  # a constant buffer of old transformers
    model = model_class(config)
    absent, unused = load_tensors(model, tensors)
    return report_loading(model, absent, unused, output_loading_info)


def _modern_name(name: str) -> str:
    """Return today's name of a tensor of the 2021 repository: bottlenecks sat inside the layers, the bias outside."""
    name = name.removeprefix("module.").replace("cls.predictions.bias", "cls.predictions.decoder.bias")
    return re.sub(r"encoder\.layer\.(\d+)\.(input|output)_bottleneck\.", r"encoder.\2_bottleneck.\1.", name)
