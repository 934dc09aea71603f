"""The model card of a supernet or a subnet: what it is, how to load it, and what its author says of it.

The text is in `model_card_template.md`. This file computes the numbers in it, and escapes names that could break it.
A shape is drawn with characters: such a plot needs no file of its own, cannot be left behind when the card changes, and
its numbers can be searched, copied and read aloud.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.pipelines import PIPELINE_REGISTRY

from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from ..model.shapes import SearchSpace
from ..report.tables import markdown_cell, markdown_table
from .results import library_versions


TEMPLATE = Path(__file__).with_name("model_card_template.md")
PIPELINE_TAGS = {  # class -> its task on the Hub
    "SuperShaperModel": "feature-extraction",
    "SuperShaperForMaskedLM": "fill-mask",
    "SuperShaperForSequenceClassification": "text-classification",
    "SuperShaperForTokenClassification": "token-classification",
    "SuperShaperForQuestionAnswering": "question-answering",
    "SuperShaperForMultipleChoice": None,
}
SECTIONS = ("training", "evaluation", "latency", "limits", "related")
BAR = 24  # characters of a layer of full width
LABELS = 20  # the card lists this many names of labels at most


def model_card(
    model: SuperShaperPreTrainedModel,
    repo_id: str,
    *,
    with_tokenizer: bool = True,
    mask_token: str = "[MASK]",
    pooling: str | None = None,
    normalize: bool = False,
    supernet: str | None = None,
    shape: Sequence[int] | None = None,
    weight_bytes: int | None = None,
    exports: Sequence[Any] = (),
    license: str | None = None,
    language: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    results: Sequence[EvalResult] = (),
    **sections: str | None,
) -> ModelCard:
    """Return the model card of a supernet or subnet.

    Args:
        model: The model to describe. Its parameters are counted.
        repo_id: The name of the model in the card's code examples.
        with_tokenizer: Whether the repository has a tokenizer that the examples can load.
        mask_token: The tokenizer's mask, for the example of a masked language model.
        pooling: The pooling of a sentence encoder, "mean" or "cls". Its card shows how sentence-transformers loads it.
        normalize: Whether the sentence encoder divides every embedding by its length.
        supernet: The supernet that the model was cut out of: a Hub id, or the name of a folder.
        shape: The shape at which it was cut, with a 0 for each dropped layer; by default its hidden sizes. For a
            supernet, the shape that the example in its card cuts out; by default a hand-crafted one.
        weight_bytes: Size of the weight files.
        exports: The exported files in the repository: see `supershaper_hf.publish.export.add_exports`.
        license: Licence identifier of the Hub, such as `"apache-2.0"`. By default the card claims none.
        language: Language code, such as `"en"`.
        base_model: Hub id of the model from which the weights started.
        datasets: Hub ids of the training data.
        tags: Further tags.
        results: Scores for the metadata of the card (`model-index`).
        **sections: Markdown text of the sections `training`, `evaluation`, `latency`, `limits` and `related` (other
            repositories). Without its text, the section on latency or on related repositories is left out.

    Raises:
        TypeError: If there is no such section.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> config = SuperShaperConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> card = model_card(SuperShaperForMaskedLM(config), "user/tiny", license="apache-2.0")
        >>> card.data.license, card.data.pipeline_tag
        ('apache-2.0', 'fill-mask')
    """
    if unknown := sections.keys() - set(SECTIONS):
        raise TypeError(f"A card has no {', '.join(sorted(unknown))}. Its sections: {', '.join(SECTIONS)}.")
    config: Any = model.config
    architecture = type(model).__name__
    elastic = not config.merged_bottlenecks
    task = PIPELINE_TAGS.get(architecture) if pooling is None else "sentence-similarity"
    name, sentence_tags = repo_id.split("/")[-1], ["sentence-transformers", "sentence-similarity"] if pooling else []
    data = ModelCardData(
        model_name=name,
        library_name="transformers" if pooling is None else "sentence-transformers",
        pipeline_tag=task,
        license=license,
        language=language,
        base_model=base_model,
        datasets=list(datasets) if datasets else None,
        tags=["supershaper", "bert", *sentence_tags, *(tags or [])],
        eval_results=list(results) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=plain(name),
        quoted_repo_id=quoted(repo_id),
        auto_class=architecture.replace("SuperShaperModel", "AutoModel").replace("SuperShaperFor", "AutoModelFor"),
        config=config,
        supernet=None if supernet is None else inline_code(supernet),
        facts=facts(model, supernet, base_model, weight_bytes),
        bars=None if elastic else bars(shape or config.hidden_sizes, config.hidden_size),
        half=dtype if (dtype := str(model.dtype).removeprefix("torch.")) != "float32" else None,
        subnet_example=subnet_example(model, shape) if elastic else None,
        with_tokenizer=with_tokenizer,
        pooling=pooling,
        pipeline=pipeline_example(task, mask_token) if with_tokenizer else None,
        export_table=markdown_table(export_rows(exports)) if exports else None,
        onnx=onnx_example(exports, repo_id, task, mask_token, pooling) if with_tokenizer else None,
        normalize=normalize,
        **{name: whole(sections.get(name)) for name in SECTIONS},
    )


# What the card shows


def facts(
    model: SuperShaperPreTrainedModel, supernet: str | None, base_model: str | None, weight_bytes: int | None
) -> str:
    """Return the lines of the table of facts, in Markdown."""
    config: Any = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    cells = {
        "class": inline_code(type(model).__name__),
        "parameters": f"{parameters:,}",
        "weights on disk": None if weight_bytes is None else f"{megabytes(weight_bytes)}, {dtype}",
        "hidden sizes by layer": str(config.hidden_sizes),
        "embedding width": str(config.hidden_size),
        "attention heads": str(config.num_attention_heads),
        "intermediate size": str(config.intermediate_size),
        "vocabulary": f"{config.vocab_size:,}",
        "longest input": f"{config.max_position_embeddings} tokens",
        "labels": labels(model),
        "cut out of": None if supernet is None else inline_code(supernet),
        "started from": None if base_model in (None, supernet) else inline_code(str(base_model)),
        "made with": ", ".join(f"{library} {number}" for library, number in library_versions().items()),
    }
    return "\n".join(f"| {name} | {markdown_cell(cell)} |" for name, cell in cells.items() if cell is not None)


def labels(model: SuperShaperPreTrainedModel) -> str | None:
    """Return the names of a classifier's labels as Markdown; `None` for another model."""
    if PIPELINE_TAGS.get(type(model).__name__) not in ("text-classification", "token-classification"):
        return None
    config: Any = model.config
    names = [inline_code(str(name)) for _, name in sorted(config.id2label.items())]
    more = f" and {len(names) - LABELS} more" if len(names) > LABELS else ""
    return ", ".join(names[:LABELS]) + more


def bars(shape: Sequence[int], full: int) -> str:
    """Return a plot of a shape: a line for each layer, with a bar that is `BAR` characters long at the width `full`.

    Example:
        >>> print(bars([48, 24, 0], 48))
        layer 1  ████████████████████████  48
        layer 2  ████████████░░░░░░░░░░░░  24
        layer 3  ░░░░░░░░░░░░░░░░░░░░░░░░  dropped
    """
    digits, widest = len(str(len(shape))), len(str(max(shape)))
    lines = []
    for number, width in enumerate(shape, start=1):
        filled = max(1, round(BAR * width / full)) if width else 0
        size = str(width).rjust(widest) if width else "dropped"
        lines.append(f"layer {number:>{digits}}  {'█' * filled}{'░' * (BAR - filled)}  {size}")
    return "\n".join(lines)


def megabytes(size: int) -> str:
    """Return a number of bytes for people.

    Example:
        >>> megabytes(121_743_872), megabytes(94_312)
        ('121.7 MB', '0.09 MB')
    """
    return f"{size / 1e6:.{1 if size >= 1e6 else 2}f} MB"


def pipeline_example(task: str | None, mask_token: str) -> dict[str, str] | None:
    """Return the name of a pipeline and a text for it as Python literals; `None` if transformers has none."""
    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        return None
    text = f"The cat sat on the {mask_token}." if task == "fill-mask" else "The cat sat on the mat."
    return {"task": quoted(task), "text": quoted(text)}


def onnx_example(
    exports: Sequence[Any], repo_id: str, task: str | None, mask_token: str, pooling: str | None
) -> dict[str, Any] | None:
    """Return the literals of the examples for ONNX Runtime and transformers.js; `None` if there is nothing for them.

    They run the file of 32-bit floats if there is one. Multiple choice has inputs with one axis more, and no example.
    """
    files = {each.format: each.path for each in exports if each.format in ("onnx", "int8")}
    if not files or task is None:
        return None
    features = task in ("sentence-similarity", "feature-extraction")
    texts = {
        "fill-mask": [f"The cat sat on the {mask_token}."],
        "question-answering": ["Where did the cat sit?", "The cat sat on the mat."],
    }
    return {
        "file": quoted(files.get("onnx") or files["int8"]),
        "dtype": "fp32" if "onnx" in files else "q8",
        "repo_id": json.dumps(repo_id),
        "task": "feature-extraction" if features else task,
        "as_bert": not features,
        "texts": ", ".join(json.dumps(text) for text in texts.get(task, ["The cat sat on the mat."])),
        "pooling": pooling,
    }


def export_rows(exports: Sequence[Any]) -> list[Mapping[str, str]]:
    """Return one row of a table for each exported file."""
    return [
        {
            "file": inline_code(each.path),
            "format": each.format,
            "size": megabytes(each.size),
            "largest difference from PyTorch": f"{each.difference:.1e}",
            "mean cosine of token vectors": "" if each.cosine is None else f"{each.cosine:.4f}",
        }
        for each in exports
    ]


def subnet_example(model: SuperShaperPreTrainedModel, shape: Sequence[int] | None) -> str:
    """Return the lines of Python that cut a subnet out of a supernet: at `shape`, or at a hand-crafted one."""
    if shape is not None:
        size = SearchSpace.from_model(model).num_parameters(shape)
        return f"subnet = model.extract_subnet({list(shape)})  # the best of its search for {size:,} parameters"
    return (
        "from supershaper_hf import SearchSpace\n\n"
        f'shape = SearchSpace.from_model(model).named_shape("supershaper", max_parameters={middle_budget(model)})\n'
        "subnet = model.extract_subnet(shape)"
    )


def middle_budget(model: SuperShaperPreTrainedModel) -> int:
    """Return a number of parameters in the middle of a supernet's range, rounded up, for the example in its card."""
    space = SearchSpace.from_model(model)
    middle = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    digit = 10 ** (len(str(middle)) - 2)
    return -(-middle // digit) * digit


# A name, such as that of a folder, can contain any character. These functions keep it from breaking Markdown or code.


def block_quote(text: str) -> str:
    """Return Markdown as a quotation, which nothing in it can end.

    Example:
        >>> block_quote("# Two")
        '> # Two'
    """
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def whole(text: str | None) -> str | None:
    """Return the Markdown of a section with a last line that ends a block of code which it leaves open.

    Without it, the rest of the card would be part of that code.

    Example:
        >>> whole("~~~ unfinished").splitlines()
        ['~~~ unfinished', '~~~']
    """
    fence: str | None = None
    for line in (text or "").splitlines():
        found = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if found and fence is None:
            fence = found[1]
        elif found and fence and found[1].startswith(fence) and not found[2].strip():
            fence = None
    return text if fence is None else f"{text}\n{fence}"


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
