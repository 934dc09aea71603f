"""Cut a subnet out of a saved supernet tensor by tensor, without building the supernet in memory."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files import check_output_folder, write_folder
from ..model import modeling_supershaper
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.elastic import subnet_tensors
from ..model.modeling_supershaper import empty_model


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


def extract_from_folder(source: str | Path, shape: Sequence[int], target: str | Path) -> Path:
    """Cut a subnet out of a supernet saved in `source` and save it in `target`, without building the supernet.

    Reads one tensor at a time, so the peak memory is the subnet plus the largest tensor. Copies the tokenizer's files.

    Args:
        source: A folder written by `save_pretrained`; sharded weights too.
        shape: One hidden size per layer out of the supernet's width choices; 0 drops the layer.
        target: A folder that does not exist or is empty. It appears complete or not at all.

    Returns:
        The path of `target`, for `from_pretrained`.

    Raises:
        FileExistsError: If `target` is not empty.
        FileNotFoundError: If `source` holds no safetensors weights.
        OSError: If the weights are truncated.
        ValueError: If `shape` is not allowed, or a tensor is missing or has another size than the configuration says.

    Example:
        >>> extract_from_folder("supernet", [360] * 12, "subnet")  # doctest: +SKIP
    """
    source = Path(source)
    check_output_folder(target)
    config = SuperShaperConfig.from_pretrained(source)
    shape = config.normalize_shape(shape)
    name = (config.architectures or ["SuperShaperForMaskedLM"])[0]
    if name not in modeling_supershaper.__all__:
        raise ValueError(f"{source} holds a {name}; allowed: {', '.join(modeling_supershaper.__all__)}.")
    model_class = getattr(modeling_supershaper, name)
    dtype = config.dtype or torch.float32
    subnet = empty_model(model_class, config.subnet_config(shape)).to(dtype)
    if getattr(subnet, "pooler", None) is not None and "pooler.dense.weight" not in weight_files(source):
        subnet.pooler = None  # saved from a SuperShaperModel without one
    load = _tensor_loader(source, empty_model(model_class, config).state_dict())
    # A narrowed tensor is a view of the whole one: clone it, so that the whole one can be freed.
    tensors = {
        key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in subnet_tensors(subnet, shape, load)
    }

    def write(folder: Path) -> None:
        subnet.save_pretrained(folder, state_dict=tensors)
        for file in TOKENIZER_FILES:
            if (source / file).exists():
                shutil.copy(source / file, folder / file)

    return write_folder(target, write)


def _tensor_loader(folder: Path, expected: Mapping[str, torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """Return a function that reads one tensor by name and checks its size against `expected`."""
    files = weight_files(folder)

    def load(name: str) -> torch.Tensor:
        if name not in files:
            raise ValueError(f"{folder} has no tensor {name!r}: the weights do not belong to its config.json.")
        # Opened anew for each tensor: the file is mapped into memory, and pages once read count until it is closed.
        with safe_open(files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{files[name]}: {name} is {list(tensor.shape)}, but config.json says {list(expected[name].shape)}."
            )
        return tensor

    return load


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors file of each tensor saved in `folder`, whole or sharded.

    Raises:
        FileNotFoundError: If there is no safetensors file.
        OSError: If one is truncated.
    """
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.exists():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [folder / shard for shard in sorted(set(shards))]
    else:
        paths = [single]
    files: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: {folder} needs {SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and its "
                "shards. Save the supernet with save_pretrained first."
            )
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except SafetensorError as error:
            raise OSError(f"{path} is damaged or cut short ({error}). Copy the file again.") from error
    return files
