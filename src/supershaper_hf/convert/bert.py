"""From a BERT checkpoint or model to a supernet that computes the same."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from logging import ERROR, LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BertConfig, BertModel, BertPreTrainedModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..model.configuration_supershaper import SuperShaperConfig
from ..model.modeling_supershaper import SuperShaperModel
from .calibration import calibrate


logger = logging.get_logger(__name__)


def from_bert(
    model_class: type,
    source: str | Path | PreTrainedModel,
    width_choices: list[int] | None = None,
    head_slicing: str | None = None,
    bottlenecks: str = "shared",
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Make a supernet that computes what a BERT computes.

    Without `calibration` it starts as in the paper: the bottlenecks are identities, and a narrow layer takes the first
    channels, whatever they are. With `calibration` the narrow shapes start much closer to the BERT, see `calibrate`.

    Args:
        model_class: The SuperShaper head to make. It is read from the BERT head of the same name.
        source: A folder or Hub id of a BERT checkpoint, or a BERT model: cased or uncased, of any size, with or without
            masked-LM head and pooler. The tokenizer of the BERT is the tokenizer of the supernet.
        width_choices: As in `SuperShaperConfig`.
        head_slicing: As in `SuperShaperConfig`. By default `"per_head"` with `calibration`, else `"prefix"`.
        bottlenecks: As in `SuperShaperConfig`.
        calibration: Batches of 20,000 to 200,000 tokens in all, with `input_ids` and `attention_mask`.
        output_loading_info: Whether to return also a dictionary with the lists `missing_keys`, the newly initialised
            tensors of the supernet, and `unexpected_keys`, the unused tensors of the source.
        **kwargs: For a checkpoint, the arguments of `from_pretrained`, such as `revision`, `token` and `dtype`.

    Returns:
        The supernet in evaluation mode, with `output_loading_info` a pair of it and the dictionary.

    Raises:
        TypeError: If `kwargs` are given for a model in memory.
        ValueError: If the source is not a BERT encoder, its config.json does not describe a model, or `calibration`
            has no text.
        StrictDataclassError: If `width_choices` do not fit the BERT.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from supershaper_hf import SuperShaperForMaskedLM
        >>> bert = BertForMaskedLM(BertConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2))
        >>> SuperShaperForMaskedLM.from_bert(bert, width_choices=[24, 48, 96]).config.width_choices
        [24, 48, 96]
    """
    missing: set[str] = set()
    unexpected: set[str] = set()
    choices = {
        "width_choices": width_choices,
        "head_slicing": head_slicing or ("prefix" if calibration is None else "per_head"),
        "bottlenecks": bottlenecks,
    }
    if isinstance(source, (str, Path)):
        bert_config = AutoConfig.from_pretrained(source, **kwargs)
        config = supernet_config(bert_config, str(source), choices)
        bert_class = getattr(transformers, model_class.__name__.replace("SuperShaper", "Bert"))
        with only_errors("transformers.modeling_utils"):  # `report_loading` says what is missing and unused
            bert, info = bert_class.from_pretrained(source, output_loading_info=True, **kwargs)
        missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    elif not isinstance(source, BertPreTrainedModel):
        raise ValueError(
            f"from_bert takes a folder, a Hub id or a BERT model of transformers, not {type(source).__name__}."
        )
    else:
        if kwargs:
            raise TypeError(f"from_bert: {sorted(kwargs)} can be given for a checkpoint only, not for a model.")
        bert = source
        config = supernet_config(bert.config, type(bert).__name__, choices)
    tensors = bert.state_dict()
    if isinstance(bert, BertModel):
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    # BERT keeps the decoder's bias a second time under this name.
    tensors.pop("cls.predictions.bias", None)
    missing.discard("cls.predictions.bias")
    unexpected.discard("cls.predictions.bias")
    model = model_class(config).to(bert.dtype)
    absent, unused = load_tensors(model, tensors)
    absent = {name for name in absent if "_bottleneck." not in name}  # they start as identity
    if calibration is not None:
        calibrate(model, calibration)
    return report_loading(model, missing | absent, unexpected | unused, output_loading_info)


def supernet_config(bert_config: PreTrainedConfig, name: str, choices: Mapping[str, Any]) -> SuperShaperConfig:
    """Return the configuration of the supernet of a BERT, with the fields `choices`. Error messages contain `name`.

    Only fields of `BertConfig` are copied. Other entries of a config.json, such as fields of `SuperShaperConfig`, would
    turn the BERT into something else.
    """
    values = bert_config.to_dict()
    check_bert(values, name)
    known = {field.name for field in fields(BertConfig)} & {field.name for field in fields(SuperShaperConfig)}
    shared = {key: value for key, value in values.items() if key in known}
    SuperShaperConfig.from_dict(dict(shared), name_or_path=name)  # its errors name the BERT's file
    return SuperShaperConfig.from_dict({**shared, **choices})


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Let the logger called `name` pass on nothing below errors."""

    def is_error(record: LogRecord) -> bool:
        return record.levelno >= ERROR

    noisy = getLogger(name)
    noisy.addFilter(is_error)  # its level stays as it is: transformers looks at it
    try:
        yield
    finally:
        noisy.removeFilter(is_error)


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


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Copy named tensors into `model`. Return the names that are missing in `tensors`, and those that are unused.

    Raises:
        ValueError: If a tensor has another size than in `model`.
    """
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
    by_width = {name for name in keys.missing_keys if "by_width." in name}
    if by_width:
        share_bottlenecks(model)
    return set(keys.missing_keys) - by_width - set(model.all_tied_weights_keys), set(keys.unexpected_keys)


@torch.no_grad()
def share_bottlenecks(model: Any) -> None:
    """Give every narrow width its part of the shared output bottleneck, so that it computes as with shared ones."""
    encoder = model.base_model.encoder
    for index, exit in enumerate(encoder.output_bottleneck):
        for width in model.config.width_choices[:-1]:
            own = encoder.narrow(index, width).output_bottleneck
            own.weight.copy_(exit.weight[:, :width])
            own.bias.copy_(exit.bias)


def report_loading(model: Any, missing: Iterable[str], unexpected: Iterable[str], output_loading_info: bool) -> Any:
    """Log what was missing and unused, and return the model in evaluation mode.

    Its configuration names its class from now on, as after `from_pretrained`, and not the class of the source.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing:
        logger.warning(
            f"These tensors are missing in the source and newly initialised, so train them before use: {missing}"
        )
    if unexpected:
        logger.warning(f"These tensors of the source are not used: {unexpected}")
    model.eval()
    model.config.architectures = [type(model).__name__]
    return (model, {"missing_keys": missing, "unexpected_keys": unexpected}) if output_loading_info else model
