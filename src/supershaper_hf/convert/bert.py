"""Into and out of the supernet's format: from BERT, from the 2021 repository, and from disk to disk.

`from_bert` and `from_original` make a supernet; both log which tensors were missing or unused. `extract_from_folder`
cuts a subnet out of a saved supernet tensor by tensor, for supernets that do not fit in memory beside their subnet.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, BertModel, BertPreTrainedModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..files import check_output_folder, write_folder
from ..model import modeling_supershaper
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.elastic import subnet_tensors
from ..model.modeling_supershaper import SuperShaperModel, empty_model


logger = logging.get_logger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)


def from_bert(
    model_class: type,
    source: str | Path | PreTrainedModel,
    width_choices: list[int] | None = None,
    head_slicing: str = "prefix",
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Make a supernet that computes what a BERT computes: identity bottlenecks around every layer.

    Args:
        model_class: The SuperShaper head to make; each is read from the BERT head of the same name.
        source: A folder or Hub id of a BERT checkpoint, or a BERT model. Cased, uncased, base, large, MiniLM, with or
            without masked-LM head or pooler. Its tokenizer is used as it is.
        width_choices: As in `SuperShaperConfig`.
        head_slicing: As in `SuperShaperConfig`.
        output_loading_info: Whether to return also a dictionary of `missing_keys`, newly initialised tensors of the
            supernet, and `unexpected_keys`, tensors of the source that were not used.
        **kwargs: For a checkpoint, passed to `from_pretrained`: `revision`, `token`, `dtype`, ...

    Raises:
        ValueError: If the source is not a BERT encoder, or the widths do not fit it.
    """
    missing: set[str] = set()
    unexpected: set[str] = set()
    if isinstance(source, (str, Path)):
        check_bert(AutoConfig.from_pretrained(source, **kwargs).to_dict(), str(source))
        bert_class = getattr(transformers, model_class.__name__.replace("SuperShaper", "Bert"))
        bert, info = bert_class.from_pretrained(source, output_loading_info=True, **kwargs)
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    elif not isinstance(source, BertPreTrainedModel):
        raise ValueError(
            f"from_bert takes a folder, a Hub id or a BERT model of transformers, not {type(source).__name__}."
        )
    else:
        if kwargs:
            raise TypeError(f"from_bert: {sorted(kwargs)} only make sense for a checkpoint, not for a model in memory.")
        bert = source
        check_bert(bert.config.to_dict(), type(bert).__name__)
    bert_only = {"model_type", "is_decoder", "add_cross_attention", "use_cache", "position_embedding_type", "auto_map"}
    shared = {key: value for key, value in bert.config.to_dict().items() if key not in bert_only}
    config = SuperShaperConfig.from_dict({**shared, "width_choices": width_choices, "head_slicing": head_slicing})
    tensors = bert.state_dict()
    if isinstance(bert, BertModel):
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    # BERT keeps the decoder's bias a second time under this name.
    tensors.pop("cls.predictions.bias", None)
    missing.discard("cls.predictions.bias")
    unexpected.discard("cls.predictions.bias")
    model = model_class(config).to(bert.dtype)
    absent, unused = _load(model, tensors)
    absent = {name for name in absent if "_bottleneck." not in name}  # they start as identity
    return _report(model, missing | absent, unexpected | unused, output_loading_info)


def check_bert(config: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError unless `config` describes a BERT encoder with absolute positions."""
    family = config.get("model_type")
    if family == "supershaper":
        raise ValueError(f"{name} is a SuperShaper model already: load it with from_pretrained.")
    if family != "bert":
        raise ValueError(
            f"{name} has model_type={family!r}, which is not BERT. from_bert takes checkpoints with model_type='bert' "
            "(post-LN layers, absolute positions): bert-base, bert-large, cased or uncased, multilingual, MiniLM, "
            "TinyBERT. RoBERTa, ELECTRA, ALBERT, DistilBERT and DeBERTa are other architectures."
        )
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ValueError(f"{name} is configured as a decoder; only BERT encoders can become a supernet.")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{name} has position_embedding_type={config['position_embedding_type']!r}; allowed: 'absolute'."
        )


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
    absent, unused = _load(model, tensors)
    return _report(model, absent, unused, output_loading_info)


def _modern_name(name: str) -> str:
    """Return today's name of a tensor of the 2021 repository: bottlenecks sat inside the layers, the bias outside."""
    name = name.removeprefix("module.").replace("cls.predictions.bias", "cls.predictions.decoder.bias")
    return re.sub(r"encoder\.layer\.(\d+)\.(input|output)_bottleneck\.", r"encoder.\2_bottleneck.\1.", name)


def _load(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Copy named tensors into `model`; return the names it lacks and those it has no place for. Wrong sizes raise."""
    if isinstance(model, SuperShaperModel):
        tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(sizes[name])}"
        for name, tensor in tensors.items()
        if name in sizes and tensor.shape != sizes[name]
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors do not fit the configuration: {'; '.join(wrong[:3])}. Check vocab_size, "
            "hidden_size, intermediate_size and max_position_embeddings."
        )
    keys = model.load_state_dict(tensors, strict=False)
    return set(keys.missing_keys) - set(model.all_tied_weights_keys), set(keys.unexpected_keys)


def _report(model: Any, missing: Iterable[str], unexpected: Iterable[str], output_loading_info: bool) -> Any:
    """Log what was missing and unused, as `from_pretrained` does, and return the model in evaluation mode."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing:
        logger.warning(f"Missing in the source, newly initialised (train them before use): {missing}")
    if unexpected:
        logger.warning(f"Unused tensors of the source: {unexpected}")
    model.eval()
    return (model, {"missing_keys": missing, "unexpected_keys": unexpected}) if output_loading_info else model


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
