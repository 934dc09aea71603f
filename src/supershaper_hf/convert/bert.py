"""From a BERT checkpoint or model to a supernet that computes the same."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BertModel, BertPreTrainedModel, PreTrainedModel
from transformers.utils import logging

from ..model.configuration_supershaper import SuperShaperConfig
from ..model.modeling_supershaper import SuperShaperModel


logger = logging.get_logger(__name__)


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
    absent, unused = load_tensors(model, tensors)
    absent = {name for name in absent if "_bottleneck." not in name}  # they start as identity
    return report_loading(model, missing | absent, unexpected | unused, output_loading_info)


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


def report_loading(model: Any, missing: Iterable[str], unexpected: Iterable[str], output_loading_info: bool) -> Any:
    """Log what was missing and unused, as `from_pretrained` does, and return the model in evaluation mode."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing:
        logger.warning(f"Missing in the source, newly initialised (train them before use): {missing}")
    if unexpected:
        logger.warning(f"Unused tensors of the source: {unexpected}")
    model.eval()
    return (model, {"missing_keys": missing, "unexpected_keys": unexpected}) if output_loading_info else model
