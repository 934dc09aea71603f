"""The card of a model says what is true, runs, and is not broken by any name."""

import ast
import re

import pytest
import safetensors.torch
from conftest import tiny_model
from huggingface_hub import EvalResult, ModelCard
from publishing import IGNORE_UPLOADS, SHAPE, files
from transformers.pipelines import PIPELINE_REGISTRY

from supershaper_hf import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
)
from supershaper_hf.publish.card import model_card
from supershaper_hf.publish.hub import push_to_hub, save_for_hub


pytestmark = IGNORE_UPLOADS


def stored_parameters(weights):
    return sum(tensor.numel() for tensor in safetensors.torch.load(weights).values())


def test_card_claims_nothing_that_was_not_said(folder):
    metadata = ModelCard.load(folder / "README.md").data.to_dict()
    assert metadata == {
        "library_name": "transformers",
        "model_name": "name",
        "pipeline_tag": "fill-mask",
        "tags": ["supershaper", "bert"],
    }
    assert "started from" not in (folder / "README.md").read_text()


def test_card_says_what_its_author_said(subnet, tmp_path):
    metadata = {
        "license": "apache-2.0",
        "language": "en",
        "base_model": "google-bert/bert-base-cased",
        "datasets": ["wikimedia/wikipedia"],
    }
    sections = {"training": "One epoch.", "evaluation": "| loss |\n| --- |\n| 2.5 |", "limits": "English: only."}
    save_for_hub(subnet, tmp_path / "subnet", tags=["tiny"], **metadata, **sections)
    card = ModelCard.load(tmp_path / "subnet" / "README.md")
    assert metadata.items() <= card.data.to_dict().items()
    assert card.data.tags == ["supershaper", "bert", "tiny"]
    for title, text in sections.items():
        assert f"## {title.capitalize()}\n\n{text}\n\n" in card.text
    assert "| started from | `google-bert/bert-base-cased` |\n" in card.text


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_card_says_that_half_precision_is_slow_on_many_cpus(pooling):
    model = tiny_model(SuperShaperModel)
    assert "slow" not in str(model_card(model, "user/name", pooling=pooling))
    text = str(model_card(model.bfloat16(), "user/name", pooling=pooling))
    assert 'stored in bfloat16, in which many CPUs are slow: give `dtype="float32"`' in text
    assert ("to SentenceTransformer." in text) == (pooling is not None)


@pytest.mark.parametrize(
    ("pooling", "words"), [("mean", "mean of the token states"), ("cls", "state of the first token")]
)
def test_card_of_a_sentence_encoder_shows_its_library(pooling, words, model_class):
    card = model_card(tiny_model(model_class), "user/name", pooling=pooling, tags=["tiny"])
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert card.data.tags == ["supershaper", "bert", "sentence-transformers", "sentence-similarity", "tiny"]
    assert f"An embedding is the {words}, at width 48.\n" in card.text
    first, second = re.findall(r"```python\n(.+?)```", card.text, re.DOTALL)[:2]
    assert 'SentenceTransformer("user/name", trust_remote_code=True)' in first
    assert "from_pretrained" in second


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_card_has_one_metadata_block_and_whole_tables(pooling, model_class):
    for model in (tiny_model(model_class), tiny_model(model_class).extract_subnet(SHAPE)):
        readme = str(model_card(model, "user/name", base_model="bert", pooling=pooling))
        assert re.match(r"---\n(\w+: \S+\n|\w+:\n(- \S+\n)+)+---\n\n# name\n", readme)
        assert readme.splitlines().count("---") == 2
        assert readme.count("```") % 2 == 0
        assert "\n\n\n" not in readme
        assert not re.search(r"None|Undefined|[{}]{2}|{%", readme)
        table = readme.split("| --- | --- |\n")[1].split("\n\n")[0].splitlines()
        labelled = model_class in (SuperShaperForSequenceClassification, SuperShaperForTokenClassification)
        assert len(table) == 10 + labelled
        assert all(re.fullmatch(r"\| [^|]+ \| [^|]+ \|", row) for row in table)


def test_card_counts_the_stored_parameters(model_class, tmp_path):
    for kind, shape in {"supernet": None, "subnet": SHAPE}.items():
        model = tiny_model(model_class)
        folder = save_for_hub(model.extract_subnet(shape) if shape else model, tmp_path / kind)
        count = stored_parameters((folder / "model.safetensors").read_bytes())
        assert f"| parameters | {count:,} |\n" in (folder / "README.md").read_text()
        sizes = [width for width in shape if width] if shape else [48, 48, 48]
        assert f"| hidden sizes by layer | {sizes} |\n" in (folder / "README.md").read_text()


def test_card_promises_the_pipeline_of_its_head_if_there_is_one(model_class):
    card = model_card(tiny_model(model_class), "user/name")
    auto_class = re.search(r"(AutoModel\w*)\.from_pretrained", card.text)[1]
    promised = re.findall(r'pipeline\("(.+?)"', card.text)
    if model_class in (SuperShaperForQuestionAnswering, SuperShaperForMultipleChoice):  # none in transformers 5
        assert promised == []
    else:
        _, task, _ = PIPELINE_REGISTRY.check_task(card.data.pipeline_tag)
        assert promised == [card.data.pipeline_tag]
        assert auto_class in [loader.__name__ for loader in task["pt"]]


@pytest.mark.parametrize("kind", ["supernet", "subnet"])
def test_code_in_the_card_runs(kind, model_class, server, tokenizer):
    model = tiny_model(model_class)
    push_to_hub(model if kind == "supernet" else model.extract_subnet(SHAPE), "user/name", tokenizer=tokenizer)
    variables = {}
    blocks = re.findall(r"```python\n(.+?)```", files(server)["README.md"].decode(), re.DOTALL)
    has_pipeline = model_class not in (SuperShaperForQuestionAnswering, SuperShaperForMultipleChoice)
    assert len(blocks) == {"supernet": 2, "subnet": 1}[kind] + has_pipeline
    for block in blocks:
        exec(block, variables)
    assert type(variables["model"]) is model_class
    assert variables["tokenizer"].get_vocab() == tokenizer.get_vocab()
    assert ("result" in variables) == has_pipeline


def test_card_shows_no_tokenizer_where_there_is_none(subnet, tmp_path):
    folder = save_for_hub(subnet, tmp_path / "subnet")
    readme = (folder / "README.md").read_text()
    assert "okenizer" not in readme
    assert "pipeline(" not in readme  # it would look for one


HOSTILE = [
    'a"b',
    "a\\",
    "a`b``c",
    "a|b",
    "a\nb",
    "a\r\n---\n# b",
    "<script>alert(1)</script>",
    "a&b",
    "[a](javascript:b)",
    "*a*",
    "```\n\n# b\n\n```python\nraise SystemExit",
    '"); raise SystemExit #',
    "{{ 7 * 7 }}{% raw %}",
    "a: b # c",
    "- a",
    "é 中 😀",
    "a\u2028b\x85c\x00d",
]


def lines_of(card):
    """The lines of a card's body."""
    return str(card).split("\n---\n")[-1].split("\n")


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_breaks_the_card(name):
    """The default name is that of a folder, which can hold any character. So can a label, and a tokenizer's mask."""
    for model_class in (SuperShaperForMaskedLM, SuperShaperForSequenceClassification):
        for model in (tiny_model(model_class), tiny_model(model_class).extract_subnet(SHAPE)):
            cards = []
            for text in ("name", name):
                model.config.id2label = {0: text, 1: "good"}
                named = {"base_model": text, "license": text, "datasets": [text], "tags": [text]}
                named["supernet"] = f"supernet of {text}"
                cards.append(model_card(model, text, mask_token=text, **named))
            usual, card = cards
            data = ModelCard(str(card)).data
            assert data.model_name == name.split("/")[-1]
            assert data.tags == ["supershaper", "bert", name]
            assert (data.license, data.base_model, data.datasets) == (name, name, [name])
            # The body: as many lines, each of the same kind, and code that names the model.
            body, usual_body = lines_of(card), lines_of(usual)
            assert len(body) == len(usual_body)
            assert [line[:2] for line in body if line.startswith(("#", "|", "`"))] == [
                line[:2] for line in usual_body if line.startswith(("#", "|", "`"))
            ]
            blocks = re.findall(r"```python\n(.+?)\n```\n", "\n".join(body), re.DOTALL)
            calls = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
            literals = [
                ast.literal_eval(node.args[0]) for node in calls if ast.unparse(node.func).endswith("from_pretrained")
            ]
            assert literals == [name, name]
            options = {word.arg: word.value for node in calls for word in node.keywords}
            assert ast.literal_eval(options["model"]) == name
            title = next(line for line in body if line.startswith("# "))
            assert not re.search(r"[<>]|(?<!\\)[`*\[\]]", title)
            for row in ("started from", "cut out of"):
                line = next(line for line in body if line.startswith(f"| {row}"))
                assert re.fullmatch(rf"\| {row} \| (`+) ?(\\\||[^|])* ?\1 \|", line)


@pytest.mark.parametrize("mask", ['"); raise SystemExit #', "```", "{{ 7 * 7 }}", "[M\nASK]"])
def test_no_mask_breaks_the_example(mask):
    block = next(
        block for block in str(model_card(tiny_model(), "n", mask_token=mask)).split("```python\n") if "pipe(" in block
    )
    call = next(node for node in ast.walk(ast.parse(block.split("\n```\n")[0])) if "pipe(" in ast.unparse(node))
    assert f"The cat sat on the {mask}." in [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]


SECTIONS = ["training", "evaluation", "latency", "limits", "related"]


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1)",
        "~~~~\n~~~\n```",
        "````md\n```\na\n```",
        "```\na\n``` no end",
        "---\nlicense: mit\n---",
        "{{ 7 * 7 }}",
    ],
)
def test_no_section_takes_the_others_with_it(section, text):
    """A block of code that is left open is closed; the metadata is not that of a section; nothing is a template."""
    card = model_card(tiny_model(), "user/name", **{section: text})
    assert card.data.license is None
    assert f"\n{text}\n" in str(card)
    outside, fence = [], None
    for line in str(card).splitlines():
        marks = re.match("[`~]{3,}", line)
        if marks and fence is None:
            fence = marks[0]
        elif marks and marks[0].startswith(fence) and line == marks[0]:
            fence = None
        elif fence is None:
            outside.append(line)
    titles = ["Use", "Training", "Evaluation", "Latency", "Limits", "Related repositories", "Citation"]
    wanted = [
        title for title in titles if title.lower().startswith(section) or title[0] not in "LR" or title == "Limits"
    ]
    assert [line[3:] for line in outside if line.startswith("## ")] == wanted
    assert fence is None


def test_unknown_section_is_refused():
    with pytest.raises(TypeError, match=r"A card has no trained\. Its sections: training, evaluation, latency, limits"):
        model_card(tiny_model(), "user/name", trained="One epoch.")


# What it shows


def test_card_of_a_subnet_draws_its_shape_and_says_what_it_was_cut_from():
    card = model_card(
        tiny_model().extract_subnet(SHAPE), "user/name", supernet="user/net", shape=SHAPE, weight_bytes=1_234_567
    )
    assert "cut out of\nthe elastic supernet `user/net`.\n" in card.text
    assert "| cut out of | `user/net` |\n" in card.text
    assert "| weights on disk | 1.2 MB, float32 |\n" in card.text
    drawn = card.text.split("```text\n")[1].split("\n```")[0].splitlines()
    assert [line.split()[-1] for line in drawn] == ["8", "dropped", "36"]
    assert [line.count("█") for line in drawn] == [4, 0, 18]  # of 24 at the width 48
    assert len({len(line.split("  ")[1]) for line in drawn}) == 1
    assert "```text" not in model_card(tiny_model(), "user/name").text


def test_card_of_a_classifier_names_its_labels():
    model = tiny_model(SuperShaperForSequenceClassification)
    model.config.id2label = {number: f"label {number}" for number in range(22)}
    row = next(line for line in lines_of(model_card(model, "name")) if line.startswith("| labels |"))
    assert row.startswith("| labels | `label 0`, `label 1`, ")
    assert row.endswith("`label 19` and 2 more |")


def test_results_are_metadata_of_the_card():
    result = EvalResult(
        task_type="fill-mask", dataset_type="text", dataset_name="a: | b", metric_type="perplexity", metric_value=8.5
    )
    card = ModelCard(str(model_card(tiny_model(), "user/name", results=[result])))
    (found,) = card.data.eval_results
    assert (found.dataset_name, found.metric_type, found.metric_value) == ("a: | b", "perplexity", 8.5)
