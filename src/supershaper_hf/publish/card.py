"""The model card of a supernet or a subnet: what it is, how to load it, and what its author says of it.

The text is in `model_card_template.md`. This file computes the numbers in it, and escapes names that could break it.
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.pipelines import PIPELINE_REGISTRY

from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from ..model.shapes import SearchSpace
from ..report.tables import markdown_cell


TEMPLATE = Path(__file__).with_name("model_card_template.md")
PIPELINE_TAGS = {  # class -> its task on the Hub
    "SuperShaperModel": "feature-extraction",
    "SuperShaperForMaskedLM": "fill-mask",
    "SuperShaperForSequenceClassification": "text-classification",
    "SuperShaperForTokenClassification": "token-classification",
    "SuperShaperForQuestionAnswering": "question-answering",
    "SuperShaperForMultipleChoice": None,
}


def model_card(
    model: SuperShaperPreTrainedModel,
    repo_id: str,
    *,
    with_tokenizer: bool = True,
    pooling: str | None = None,
    license: str | None = None,
    language: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    training: str | None = None,
    evaluation: str | None = None,
    limits: str | None = None,
) -> ModelCard:
    """Return the model card of a supernet or subnet.

    Args:
        model: The model to describe. Its parameters are counted.
        repo_id: The name of the model in the card's code examples.
        with_tokenizer: Whether the repository has a tokenizer that the examples can load.
        pooling: The pooling of a sentence encoder, "mean" or "cls". Its card shows how sentence-transformers loads it.
        license: Licence identifier of the Hub, such as `"apache-2.0"`. By default the card claims none.
        language: Language code, such as `"en"`.
        base_model: Hub id of the model from which the weights started.
        datasets: Hub ids of the training data.
        tags: Further tags.
        training: Markdown text of the section on training.
        evaluation: Markdown text of the section on evaluation.
        limits: Markdown text of the section on limits.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> config = SuperShaperConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> card = model_card(SuperShaperForMaskedLM(config), "user/tiny", license="apache-2.0")
        >>> card.data.license, card.data.pipeline_tag
        ('apache-2.0', 'fill-mask')
    """
    config, architecture = model.config, type(model).__name__
    elastic = not config.merged_bottlenecks
    task = PIPELINE_TAGS.get(architecture) if pooling is None else "sentence-similarity"
    sentence_tags = [] if pooling is None else ["sentence-transformers", "sentence-similarity"]
    name = repo_id.split("/")[-1]
    has_pipeline = with_tokenizer and task in PIPELINE_REGISTRY.get_supported_tasks()
    data = ModelCardData(
        model_name=name,
        library_name="transformers" if pooling is None else "sentence-transformers",
        pipeline_tag=task,
        license=license,
        language=language,
        base_model=base_model,
        datasets=list(datasets) if datasets else None,
        tags=["supershaper", "bert", *sentence_tags, *(tags or [])],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=plain(name),
        quoted_repo_id=quoted(repo_id),
        architecture=architecture,
        auto_class=architecture.replace("SuperShaperModel", "AutoModel").replace("SuperShaperFor", "AutoModelFor"),
        config=config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        base_model=None if base_model is None else markdown_cell(inline_code(base_model)),
        middle_budget=middle_budget(model) if elastic else None,
        with_tokenizer=with_tokenizer,
        pooling=pooling,
        pipeline=inline_code(f'pipeline("{task}", model={quoted(repo_id)})') if has_pipeline else None,
        training=training,
        evaluation=evaluation,
        limits=limits,
    )


def middle_budget(model: SuperShaperPreTrainedModel) -> int:
    """Return a number of parameters in the middle of a supernet's range, rounded up, for the example in its card."""
    space = SearchSpace.from_config(model.config)
    middle = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    digit = 10 ** (len(str(middle)) - 2)
    return -(-middle // digit) * digit


# A name, such as that of a folder, can contain any character. These functions keep it from breaking Markdown or code.


def plain(text: str) -> str:
    """Return `text` for a line of Markdown, which shows it as it is: no markup, HTML or line break of its own."""
    characters = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {mark: f"\\{mark}" for mark in "\\`*[]"}
    return "".join(characters.get(character, character) for character in _one_line(text))


def inline_code(text: str) -> str:
    """Return `text` as code within a line of Markdown, even if it holds backticks or line breaks."""
    text = _one_line(text)
    fence = "`"
    while fence in text:
        fence += "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def quoted(text: str) -> str:
    """Return a Python literal of the string `text`, in double quotes and on one line."""

    def literal(character: str) -> str:
        if character in '"\\':
            return f"\\{character}"
        return character if character.isprintable() else character.encode("unicode_escape").decode()

    return f'"{"".join(map(literal, text))}"'


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
