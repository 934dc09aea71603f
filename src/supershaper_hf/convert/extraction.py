"""Cut a subnet out of a saved supernet map by map, without building the supernet in memory."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..files import check_output_folder, parse_json, to_json, write_file, write_folder
from ..model import modeling_supershaper
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.modeling_supershaper import empty_model
from ..model.narrowing import subnet_tensors


COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    # These make a SentenceTransformer of the folder. They hold for every shape.
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


def extract_from_folder(source: str | Path, shape: Sequence[int], target: str | Path) -> Path:
    """Cut a subnet out of a supernet saved in `source` and save it in `target`, without building the supernet.

    One linear map is read at a time, and what it is multiplied with: the bottleneck before it, or a code. So the peak
    memory is the subnet plus the largest tensor, or plus these maps where they are larger. The weights are those that
    `from_pretrained` reads. The files of the tokenizer and of a sentence encoder's pooling are copied.

    Args:
        source: A folder written by `save_pretrained`. The weights can be one file or several (sharded).
        shape: One hidden size per layer out of the supernet's width choices; 0 drops the layer.
        target: A folder that does not exist or is empty. It appears complete or not at all.

    Returns:
        The path of `target`, for `from_pretrained`.

    Raises:
        FileExistsError: If `target` is not empty.
        FileNotFoundError: If `source` is not a folder, or holds no safetensors weights.
        OSError: If config.json is missing, or the weights are cut short.
        ValueError: If `shape` is not allowed, config.json or the index of the weights is damaged, or a tensor is
            missing or has another size than config.json says.

    Example:
        >>> import tempfile
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SuperShaperForMaskedLM(config).save_pretrained(f"{folder}/supernet")
        ...     subnet = extract_from_folder(f"{folder}/supernet", [40, 16], f"{folder}/subnet")
        ...     SuperShaperForMaskedLM.from_pretrained(subnet).config.hidden_sizes
        [40, 16]
    """
    source = Path(source)
    check_output_folder(target)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Save the supernet there with save_pretrained first.")
    config = SuperShaperConfig.from_pretrained(source)
    shape = config.normalize_shape(shape)
    name = (config.architectures or ["SuperShaperForMaskedLM"])[0]
    if name not in modeling_supershaper.__all__:
        raise ValueError(f"{source} holds a {name}; allowed: {', '.join(modeling_supershaper.__all__)}.")
    model_class = getattr(modeling_supershaper, name)
    dtype = config.dtype or torch.float32
    files = weight_files(source, getattr(config, "transformers_weights", None))
    subnet = empty_model(model_class, config.subnet_config(shape)).to(dtype)
    if getattr(subnet, "pooler", None) is not None and "pooler.dense.weight" not in files:
        subnet.pooler = None  # saved from a SuperShaperModel without one
    load = _tensor_loader(source, files, empty_model(model_class, config).state_dict())
    # A narrowed tensor is a view of the whole one: clone it, so that the whole one can be freed.
    tensors = {
        key: tensor.clone(memory_format=torch.contiguous_format)
        for key, tensor in subnet_tensors(subnet, config, shape, load)
    }

    def write(folder: Path) -> None:
        subnet.save_pretrained(folder, state_dict=tensors)
        for file in COPIED_FILES:
            if (source / file).exists():
                (folder / file).parent.mkdir(exist_ok=True)
                shutil.copy(source / file, folder / file)
        remove_auto_map(folder / "tokenizer_config.json")

    return write_folder(target, write)


def remove_auto_map(file: Path) -> None:
    """Remove `auto_map` from the configuration of a tokenizer: the code that it names is elsewhere."""
    content = parse_json(file.read_bytes(), str(file)) if file.exists() else {}
    if isinstance(content, dict) and content.pop("auto_map", None) is not None:
        write_file(file, to_json(content, indent=2) + "\n")


def _tensor_loader(
    folder: Path, files: Mapping[str, Path], expected: Mapping[str, torch.Tensor]
) -> Callable[[str], torch.Tensor]:
    """Return a function that reads one tensor by name and compares its size with the one in `expected`."""

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


def weight_files(folder: Path, name: str | None = None) -> dict[str, Path]:
    """Return the safetensors file of each tensor saved in `folder`: the files that `from_pretrained` reads.

    A single model.safetensors goes before an index of several files, because an old index can be left behind when a
    model is saved again. Every file is named from inside the folder. It may be a symbolic link to another place, as in
    the cache of the Hub.

    Args:
        folder: A folder written by `save_pretrained`.
        name: The file to begin with, if config.json names one (`transformers_weights`).

    Raises:
        FileNotFoundError: If there is no safetensors file.
        OSError: If a file is cut short.
        ValueError: If the index is damaged, or a name leads out of the folder.
    """
    if name is None:
        sharded = (folder / SAFE_WEIGHTS_INDEX_NAME).is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file()
        name = SAFE_WEIGHTS_INDEX_NAME if sharded else SAFE_WEIGHTS_NAME
    path = _inside(folder, name)
    paths = _shards(folder, path) if name.endswith(".index.json") else [path]
    files: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
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


def _shards(folder: Path, index: Path) -> list[Path]:
    """Return the files that an index of sharded weights lists, each once."""
    content = parse_json(index.read_bytes(), str(index)) if index.is_file() else None
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(
            f"{index} is not an index of safetensors files: it has no weight_map of file names. Copy the file again."
        )
    return [_inside(folder, name) for name in sorted(set(names.values()))]


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file that is named from inside a folder."""
    path = PureWindowsPath(str(name))  # knows the separators and drives of every system
    if not isinstance(name, str) or path.anchor or ".." in path.parts:
        raise ValueError(
            f"{folder} names {name!r} as a file of its weights, but weights have to be files in this folder. Save the "
            "supernet again with save_pretrained."
        )
    return folder / name
