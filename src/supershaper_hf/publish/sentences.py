"""Sentence encoders: the files that make a saved model a SentenceTransformer, and what they say in an original.

A sentence encoder makes one embedding of the token states of a model. The library sentence-transformers reads how it
does so from JSON files beside the model:

modules.json                       the steps: model, pooling, and perhaps the division of embeddings by their length
1_Pooling/config.json              the pooling: the mean of the token states, or the state of the first token, [CLS]
sentence_bert_config.json          the number of tokens after which a text is cut
config_sentence_transformers.json  prompts: texts that are put before a query or a document

They are written in the form that its old and its current versions and text-embeddings-inference read. No file depends
on the shape: the embedding has the width `hidden_size` at every shape.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import PreTrainedTokenizerBase

from ..checks import check_choice, check_count
from ..files import parse_json, to_json, write_file
from ..model.configuration_supershaper import SuperShaperConfig


POOLINGS = ("mean", "cls")
MODULES_FILE = "modules.json"
MODEL_FILE = "sentence_bert_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
POOLING_FOLDER = "1_Pooling"
FLAGS = {  # pooling -> how the files of sentence-transformers before version 6 call it
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
NO_SUCH_FILE = (EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError)


def sentence_encoder_files(
    config: SuperShaperConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    pooling: str | None,
    normalize: bool = False,
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the files that make a SentenceTransformer of a saved model, as values that JSON knows.

    Args:
        config: The configuration of the model.
        tokenizer: The tokenizer that is saved beside the model.
        pooling: "mean", "cls", or `None` for a model that is no sentence encoder and has none of these files.
        normalize: Whether every embedding is divided by its length, so that its dot products are cosines.
        max_seq_length: Tokens after which a text is cut, by default the `model_max_length` of the tokenizer. The model
            may be able to read fewer; then it is cut after these.
        prompts: Names and texts that are put before a text, such as `{"query": "query: "}`.

    Raises:
        ValueError: If `pooling` is unknown or there is no tokenizer, if `max_seq_length` is no count, or if one of the
            other options is given without `pooling`.

    Example:
        >>> from transformers import BertTokenizer
        >>> config = SuperShaperConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> files = sentence_encoder_files(config, BertTokenizer(), "mean", normalize=True)
        >>> files["sentence_bert_config.json"]
        {'max_seq_length': 512, 'do_lower_case': False}
    """
    if pooling is None:
        if normalize or max_seq_length is not None or prompts:
            raise ValueError(
                "normalize, max_seq_length and prompts are for sentence encoders: give pooling='mean' or "
                "pooling='cls' with them."
            )
        return {}
    check_choice("pooling", pooling, POOLINGS)
    if tokenizer is None:
        raise ValueError(f"pooling={pooling!r} makes a SentenceTransformer, which needs a tokenizer: add tokenizer=...")
    if max_seq_length is None:
        max_seq_length = tokenizer.model_max_length
    check_count("max_seq_length", max_seq_length)
    max_seq_length = min(max_seq_length, config.max_position_embeddings)
    steps = [("", "Transformer"), (POOLING_FOLDER, "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    return {
        MODULES_FILE: [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{step}"}
            for index, (path, step) in enumerate(steps)
        ],
        MODEL_FILE: {"max_seq_length": int(max_seq_length), "do_lower_case": False},  # the tokenizer knows
        PROMPTS_FILE: {"prompts": dict(prompts or {}), "default_prompt_name": None, "similarity_fn_name": "cosine"},
        # text-embeddings-inference reads the flags, sentence-transformers since version 6 writes the mode instead.
        f"{POOLING_FOLDER}/config.json": {"word_embedding_dimension": config.hidden_size, "pooling_mode": pooling}
        | {flag: mode == pooling for mode, flag in FLAGS.items()},
    }


def write_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Write what `sentence_encoder_files` has returned into `folder`."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, to_json(content, indent=2) + "\n")


def read_sentence_encoder(source: str | Path) -> dict[str, Any]:
    """Return what a model says of itself as a sentence encoder, as options for `save_for_hub`.

    With them, a supernet and its subnets can take the place of the original: they pool as it does, cut texts where it
    does, and their embeddings have length 1 if its have.

    Args:
        source: A folder, or the id of a model on the Hub, of which some small files are downloaded.

    Returns:
        `pooling`, `normalize`, `max_seq_length` if the model names one, and `prompts` if there are any. It is empty if
        the model is no sentence encoder or has other steps than these, if there is no such model, or if the Hub
        cannot be reached.

    Raises:
        ValueError: If one of the files is not JSON, or has another content than its name promises.

    Example:
        >>> read_sentence_encoder("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        {'pooling': 'mean', 'normalize': True, 'max_seq_length': 256}
    """
    modules = _read(source, MODULES_FILE, list)
    steps = [str(module.get("type")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    if steps not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return {}
    pooling = _pooling_mode(_read(source, f"{POOLING_FOLDER}/config.json", dict))
    if pooling not in POOLINGS:
        return {}
    length = _read(source, MODEL_FILE, dict).get("max_seq_length")
    if length is not None:
        check_count(f"{source}: {MODEL_FILE}: max_seq_length", length)
    prompts = _read(source, PROMPTS_FILE, dict).get("prompts")
    return (
        {"pooling": pooling, "normalize": "Normalize" in steps}
        | ({} if length is None else {"max_seq_length": length})
        | ({"prompts": prompts} if isinstance(prompts, dict) and any(prompts.values()) else {})
    )


def read_pooling(source: str | Path) -> str | None:
    """Return the pooling of a sentence encoder, "mean" or "cls", or `None`: see `read_sentence_encoder`.

    Example:
        >>> read_pooling("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        'mean'
    """
    return read_sentence_encoder(source).get("pooling")


def _pooling_mode(config: Mapping[str, Any]) -> Any:
    """Return the one mode of a pooling module, or `None` if it has none or joins several."""
    modes = config.get("pooling_mode", [mode for mode, flag in FLAGS.items() if config.get(flag)])
    modes = [modes] if isinstance(modes, str) else modes
    return modes[0] if isinstance(modes, list) and len(modes) == 1 else None


def _read(source: str | Path, name: str, kind: type[list] | type[dict]) -> Any:
    """Return the content of a JSON file of a model, or an empty `kind` if the model has no such file."""
    path = Path(source) / name
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(str(source), name))
        except NO_SUCH_FILE:
            return kind()
    if not path.is_file():
        return kind()
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold a JSON {'list' if kind is list else 'object'}. Copy the file again.")
    return content
