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
        source: The checkpoint's `pytorch_model.bin`, or its state dict. The file is read as weights only: code in it
            does not run.
        config: The supernet's configuration. The 2021 code did not save one that describes the supernet.
        output_loading_info: As in `from_bert`.

    Returns:
        The supernet in evaluation mode, with `output_loading_info` a pair of it and the dictionary.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If the file is cut short or is not a checkpoint of PyTorch.
        ValueError: If the size of a tensor does not fit `config`.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> config = SuperShaperConfig(vocab_size=28996, head_slicing="prefix")
        >>> supernet = SuperShaperForMaskedLM.from_original("pytorch_model.bin", config)  # doctest: +SKIP
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
    """Return today's name of a tensor of the 2021 repository.

    There a bottleneck was a part of its layer, and the bias of the decoder was not a part of the decoder.
    """
    name = name.removeprefix("module.").replace("cls.predictions.bias", "cls.predictions.decoder.bias")
    return re.sub(r"encoder\.layer\.(\d+)\.(input|output)_bottleneck\.", r"encoder.\2_bottleneck.\1.", name)
