"""The card of a model says what is true, runs, and is not broken by any name."""

import ast
import re

import pytest
import safetensors.torch
from conftest import tiny_model
from huggingface_hub import ModelCard
from publishing import IGNORE_UPLOADS, SHAPE, files
from transformers.pipelines import PIPELINE_REGISTRY

from supershaper_hf import SuperShaperForMultipleChoice, SuperShaperForQuestionAnswering
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
        assert len(table) == 9
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
    assert len(blocks) == {"supernet": 2, "subnet": 1}[kind]
    for block in blocks:
        exec(block, variables)
    assert type(variables["model"]) is model_class
    assert variables["tokenizer"].get_vocab() == tokenizer.get_vocab()


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


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_breaks_the_card(name):
    """The default name is that of a folder, which can hold any character."""
    for model in (tiny_model(), tiny_model().extract_subnet(SHAPE)):
        readme = str(model_card(model, name, base_model=name, license=name, datasets=[name], tags=[name]))
        usual = str(model_card(model, "name", base_model="name", license="name", datasets=["name"], tags=["name"]))
        data = ModelCard(readme).data
        assert data.model_name == name.split("/")[-1]
        assert data.tags == ["supershaper", "bert", name]
        assert (data.license, data.base_model, data.datasets) == (name, name, [name])
        # The body: as many lines, each of the same kind, and code that names the model.
        body, usual_body = (text.split("\n---\n")[-1].split("\n") for text in (readme, usual))
        assert len(body) == len(usual_body)
        assert [line[:2] for line in body if line.startswith(("#", "|", "`"))] == [
            line[:2] for line in usual_body if line.startswith(("#", "|", "`"))
        ]
        code = "\n".join(body).split("```python\n")[1].split("\n```\n")[0]
        named = [node.args[0] for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        assert [ast.literal_eval(node) for node in named] == [name, name]
        title = next(line for line in body if line.startswith("# "))
        assert not re.search(r"[<>]|(?<!\\)[`*\[\]]", title)
        row = next(line for line in body if line.startswith("| started from"))
        assert re.fullmatch(r"\| started from \| (`+) ?(\\\||[^|])* ?\1 \|", row)


def test_pipeline_of_a_hostile_name_is_one_piece_of_code():
    readme = str(model_card(tiny_model(), "a`b``c"))
    assert '``` pipeline("fill-mask", model="a`b``c") ``` works' in readme
