"""From a supernet to the folder of a standalone subnet, complete with exports and a card that is made from files.

`Source` is the supernet with all that its files say of it. `find_search` and `read_search` find its search,
`shape_within` the best shape for a budget, and `write_subnet` writes the folder, which `push_folder` uploads.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..devices import device_name
from ..latency.timing import time_models
from ..model import modeling_supershaper
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from ..report.findings import CONFIG_FILE, LATENCY_FILE, PREDICTOR_FILE, RECORDS_FILE, Findings
from ..report.tables import markdown_table
from ..search.fingerprints import fingerprint_encoder, fingerprint_model
from ..search.records import parse
from .card import PIPELINE_TAGS, block_quote, inline_code
from .hub import save_for_hub
from .results import Results, search_results, tuning_results
from .sentences import read_sentence_encoder


SEARCH = "search"  # the folder of a search inside that of a supernet, here and on the Hub
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
SEARCH_FILES = (CONFIG_FILE, RECORDS_FILE, PREDICTOR_FILE, LATENCY_FILE)
NOT_WRITTEN = (  # by an author: the beginnings of what the template says instead
    "The author of this model did not",
    "A language model repeats the statistics of its training text, including its biases. The author of this model",
)
METADATA = ("license", "language", "datasets", "base_model")  # of a supernet's card, which hold for its subnets too


@dataclass(frozen=True)
class Source:
    """A model to publish from: a supernet, or a subnet that is published as it is.

    Attributes:
        path: The folder or the Hub id that it was loaded from.
        model: The model, with the head that it was saved with. A sentence encoder has no head.
        tokenizer: Its tokenizer; `None` if there is none.
        encoder: What makes it a sentence encoder: see `read_sentence_encoder`. Empty if it is none.
        metadata: License, language, data sets and base model, as far as its card names them.
        training: What its card says of its training, in Markdown; `None` if it says nothing.
        limits: What its author says of its limits, which hold for its subnets too; `None` if that is nothing.
    """

    path: str
    model: SuperShaperPreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    encoder: dict[str, Any]
    metadata: dict[str, Any]
    training: str | None
    limits: str | None

    @classmethod
    def load(cls, path: str) -> "Source":
        """Load a supernet or a subnet from a folder or the Hub. No code of a repository is run.

        Raises:
            ValueError: If it is not a model of this package.
            OSError: If there is no such model.

        Example:
            >>> Source.load("user/supernet").training  # doctest: +SKIP
            'Distillation from a frozen model, 3 random shape(s) per step. ...'
        """
        name, encoder = read_architecture(path), read_sentence_encoder(path)
        if encoder.get("pooling"):  # one needs its states; a masked-LM head was there for its training
            name = "SuperShaperModel"
        model = getattr(modeling_supershaper, name).from_pretrained(path)
        card = read_card(path)
        return cls(
            path=path,
            model=model,
            tokenizer=load_tokenizer(path),
            encoder=encoder,
            metadata={} if card is None else {key: card.data.get(key) for key in METADATA if card.data.get(key)},
            training=None if card is None else section(card.text, "Training"),
            limits=None if card is None else section(card.text, "Limits"),
        )

    @property
    def name(self) -> str:
        """What a card calls it: the Hub id, or only the last part of a folder's path."""
        return Path(self.path).resolve().name if self.is_folder else self.path

    @property
    def is_folder(self) -> bool:
        return Path(self.path).is_dir()

    def load_whole(self) -> SuperShaperPreTrainedModel:
        """Load the model again, with every head that it was saved with: those who train a supernet on need them."""
        return getattr(modeling_supershaper, read_architecture(self.path)).from_pretrained(self.path)

    @property
    def is_supernet(self) -> bool:
        return not self.model.config.merged_bottlenecks


def read_architecture(path: str) -> str:
    """Return the class of a model in a folder or on the Hub. Only its configuration is read.

    Raises:
        ValueError: If it is not a class of this package.
        OSError: If there is no such model.
    """
    config: Any = SuperShaperConfig.from_pretrained(path)
    name = (config.architectures or ["SuperShaperModel"])[0]
    if name not in modeling_supershaper.__all__:
        allowed = ", ".join(modeling_supershaper.__all__)
        raise ValueError(f"{path} holds a {name}. Allowed: {allowed}. make_supernet.py makes one of a BERT.")
    return name


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model in a folder or on the Hub; `None` if it has none. No code is run."""
    if not any(has_file(path, name) for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def has_file(path: str, name: str) -> bool:
    """Return whether a folder, or a model on the Hub, has a file."""
    if Path(path).is_dir():
        return (Path(path) / name).is_file()
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None


def read_card(path: str) -> ModelCard | None:
    """Return the card of a model in a folder or on the Hub; `None` if it has none, or one without valid metadata."""
    file = Path(path) / "README.md"
    try:
        if Path(path).is_dir():
            return ModelCard.load(file) if file.is_file() else None
        return ModelCard.load(path)
    except (EntryNotFoundError, ValueError):
        return None


def section(text: str, title: str) -> str | None:
    """Return the text of a section of a card that `model_card` has made; `None` if its author wrote nothing.

    Example:
        >>> section("## Training", "Training") is None
        True
    """
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    written = found[1].strip() if found else ""
    return written if written and not written.startswith(NOT_WRITTEN) else None


# The search


def find_search(model: str, search: str | None = None) -> Path | None:
    """Return the folder of a supernet's search; from the Hub, only the files that are needed are downloaded.

    Args:
        model: Folder or Hub id of the supernet, whose folder `search` is taken if there is one; on the Hub, if it has
            none, the data set `MODEL-search` beside it.
        search: Another folder, or the Hub id of a data set.

    Returns:
        The folder; `None` if `search` is not given and the supernet has none.

    Raises:
        FileNotFoundError: If `search` is given and holds no search.
    """
    if search is not None:
        folder = Path(search) if Path(search).is_dir() else _download(search, "dataset")
        if folder is None or not (folder / RECORDS_FILE).is_file():
            raise FileNotFoundError(
                f"{search} is neither a folder nor a data set on the Hub with {RECORDS_FILE}. Make it with "
                "examples/search_shapes.py."
            )
        return folder
    if Path(model).is_dir():
        places = [Path(model) / SEARCH]
    else:
        downloads = [_download(model, "model", f"{SEARCH}/"), _download(f"{model}-{SEARCH}", "dataset")]
        places = [folder / inside for folder, inside in zip(downloads, (SEARCH, "")) if folder is not None]
    return next((place for place in places if (place / RECORDS_FILE).is_file()), None)


def _download(repo_id: str, repo_type: str, prefix: str = "") -> Path | None:
    """Download the files of a search; return the folder of the repository, `None` if there is none."""
    try:
        patterns = [f"{prefix}{name}" for name in SEARCH_FILES]
        return Path(snapshot_download(repo_id, repo_type=repo_type, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError, LocalEntryNotFoundError):  # the last one: no network
        return None


def read_search(source: Source, folder: Path | None, sequence_length: int = 128) -> Findings | None:
    """Return what is in the folder of a search; `None` for no folder.

    Raises:
        ValueError: If the records are of another model than `source`, or the folder is damaged.
    """
    if folder is None:
        return None
    findings = Findings.read(folder, sequence_length)
    fingerprint = fingerprint_encoder if findings.measure.name == "distance" else fingerprint_model
    model: Any = source.model
    if parse(folder / RECORDS_FILE).header["model"] != fingerprint(model):
        raise ValueError(
            f"{folder / RECORDS_FILE} holds measurements of another model than {source.path}: the weights differ. Name "
            "the search of this supernet, or make one with examples/search_shapes.py."
        )
    return findings


def shape_within(findings: Findings | None, cost: str, max_cost: float) -> list[int]:
    """Return the best shape for a budget: the one with the lowest predicted loss that costs no more.

    It is the shape that the page of the search shows for this budget, and that fine-tuning with `--max_cost` takes.

    Args:
        findings: The search of the supernet.
        cost: `"parameters"` or `"flops"` of the subnet, or `"latency"`, in seconds.
        max_cost: The budget.

    Raises:
        ValueError: If there is no search, no shape is as cheap, or `cost` is latency but none was measured.
    """
    if findings is None:
        raise ValueError(
            f"max_cost={max_cost:g} needs the measured shapes of the supernet, and it has no folder {SEARCH!r}. Make "
            "one with examples/search_shapes.py, or give the shape."
        )
    return findings.front(cost).best(max_cost)


# The folder


def write_subnet(
    source: Source,
    shape: Sequence[int] | None,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    supernet: str | None = None,
    findings: Findings | None = None,
    results: Sequence[str | Path] = (),
    dataset: str | None = None,
    exports: Sequence[str] = (),
    latency: str | None = None,
    latency_batch_size: int = 1,
    latency_length: int = 128,
    **card: Any,
) -> Path:
    """Write the folder of a subnet: weights, tokenizer, code, exports, and a card made from files.

    Args:
        source: The supernet. A subnet is written as it is, without a shape.
        shape: The shape to cut out.
        folder: A folder that does not exist or is empty.
        repo_id: The name of the model in the card; by default that of the folder.
        supernet: Hub id of the supernet, if it will be published under another name than `source` has.
        findings: The search of the supernet, whose values of this shape the card shows.
        results: The `results.json` of fine-tunings of this very model.
        dataset: Hub id of the data set of `results`.
        exports: Formats to export to: see `save_for_hub`.
        latency: Device on which the subnet and the largest shape are timed for the card, such as `"cpu"`.
        latency_batch_size: Sequences in a batch that is timed.
        latency_length: Tokens in a sequence that is timed.
        **card: Further metadata and sections: see `supershaper_hf.publish.card.model_card`.

    Raises:
        FileExistsError: If `folder` is not empty.
        ValueError: If the shape is not allowed or missing, or the results are of another model.

    Example:
        >>> write_subnet(Source.load("user/supernet"), [240] * 12, "outputs/subnet")  # doctest: +SKIP
    """
    model: Any = source.model
    if source.is_supernet == (shape is None):
        raise ValueError(
            f"{source.name} is a {'supernet: give the shape' if shape is None else 'subnet: leave the shape out'}."
        )
    subnet = model if shape is None else model.extract_subnet(shape)
    task = model_task(subnet)
    found = Results()
    if findings is not None and shape is not None:
        found += search_results(findings, shape, task)
    for file in results:
        found += tuning_results(file, subnet, task, dataset)
    origin: dict[str, Any] = source.metadata | {"limits": source.limits}
    if shape is not None:
        origin |= {"supernet": supernet or source.name, "shape": list(shape), "training": training_text(source, shape)}
        if supernet or not source.is_folder:
            origin["base_model"] = supernet or source.path
    else:
        origin["training"] = source.training
    timed = None
    if latency is not None:
        timed = latency_text(source, subnet, latency, latency_batch_size, latency_length)
    return save_for_hub(
        subnet,
        folder,
        tokenizer=source.tokenizer,
        repo_id=repo_id,
        exports=exports,
        **source.encoder,
        **origin | {"evaluation": found.text or None, "results": found.scores, "latency": timed} | card,
    )


def model_task(model: SuperShaperPreTrainedModel) -> str:
    """Return the task of a model on the Hub, for the metadata of results."""
    return PIPELINE_TAGS[type(model).__name__] or "multiple-choice"


def training_text(source: Source, shape: Sequence[int]) -> str:
    """Return the section on training: the subnet was only cut out; what the supernet's card says is quoted."""
    text = f"Cut out of the supernet {inline_code(source.name)} at the shape {list(shape)}, without further training."
    if source.training is None:
        return text
    return f"{text} The card of the supernet says of its training:\n\n{block_quote(source.training)}"


def latency_text(source: Source, subnet: SuperShaperPreTrainedModel, device: str, batch_size: int, length: int) -> str:
    """Time a subnet, and beside it the largest shape of its supernet, and return the section on latency."""
    length = min(length, subnet.config.max_position_embeddings)
    models, repeats = {"this subnet": subnet}, 20
    if source.is_supernet:
        model: Any = source.model
        largest = model.config.hidden_sizes
        if subnet.config.hidden_sizes != largest:
            models["largest shape, cut out too"] = model.extract_subnet(largest)
    seconds = time_models(list(models.values()), device, batch_size, length, repeats)
    rows = [{"": name, "ms": f"{1000 * each:.1f}"} for name, each in zip(models, seconds)]
    return (
        f"Milliseconds of one batch of {batch_size} x {length} tokens on {device_name(device)}, in PyTorch, "
        f"{str(next(subnet.parameters()).dtype).removeprefix('torch.')}: the median of {repeats} runs in random order."
        f"\n\n{markdown_table(rows)}"
    )
