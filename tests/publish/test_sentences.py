"""A model that is saved with a pooling is a SentenceTransformer, and can take the place of the one it came from.

`test_downloads.py` loads one in a process that does not have the package.
"""

import json

import numpy as np
import pytest
import torch
from conftest import WORDS, randomize, tiny_bert_config, tiny_model
from publishing import IGNORE_UPLOADS, MODEL_FILES, SHAPE, TOKENIZER_FILES, contents
from sentence_transformers import SentenceTransformer
from transformers import BertModel

from supershaper_hf import SuperShaperModel, extract_from_folder, read_pooling, read_sentence_encoder, save_for_hub
from supershaper_hf.publish.hub import push_folder, push_to_hub
from supershaper_hf.publish.sentences import FLAGS


pytestmark = IGNORE_UPLOADS

SENTENCE_FILES = {
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
}
SENTENCES = ["the big cat sat on the mat .", "a dog", " ".join(WORDS * 3)]  # the last one has to be cut


def encode(folder, sentences=SENTENCES, **options):
    """The embeddings of sentence-transformers, one sentence at a time, because padding changes the last bits."""
    return SentenceTransformer(str(folder), device="cpu").encode(sentences, batch_size=1, **options)


@torch.no_grad()
def pooled(model, tokenizer, pooling):
    """The embeddings of `SENTENCES`, by the definition of each pooling, one sentence at a time."""
    rows = []
    for sentence in SENTENCES:
        batch = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=24)
        (states,) = model.base_model(**batch).last_hidden_state
        rows.append(states.mean(0) if pooling == "mean" else states[0])
    return torch.stack(rows).numpy()


@pytest.fixture
def original(tokenizer, tmp_path):
    """The folder of a BERT with a tokenizer."""
    folder = tmp_path / "original"
    randomize(BertModel(tiny_bert_config())).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_steps(folder, pooling, steps=("Transformer", "Pooling")):
    """Make a sentence encoder of a folder by hand, with the files of all-MiniLM-L6-v2."""
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [{"path": paths.get(step, f"2_{step}"), "type": f"sentence_transformers.models.{step}"} for step in steps]
    modules = [{"idx": index, "name": str(index), **module} for index, module in enumerate(modules)]
    (folder / "1_Pooling").mkdir(parents=True)
    for name, content in {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": False},
    }.items():
        (folder / name).write_text(json.dumps(content))


def flags(*modes):
    return {"word_embedding_dimension": 48} | {flag: mode in modes for mode, flag in FLAGS.items()}


# Saving


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("elastic", [True, False], ids=["supernet", "subnet"])
def test_sentence_transformers_pools_as_it_was_told(pooling, elastic, tokenizer, tmp_path):
    model = tiny_model(SuperShaperModel)
    model = model if elastic else model.extract_subnet(SHAPE)
    folder = save_for_hub(model, tmp_path / "encoder", tokenizer=tokenizer, pooling=pooling)
    assert set(contents(folder)) == MODEL_FILES | TOKENIZER_FILES | SENTENCE_FILES
    np.testing.assert_allclose(encode(folder), pooled(model, tokenizer, pooling), atol=1e-6)


def test_a_masked_lm_can_be_a_sentence_encoder(subnet, tokenizer, tmp_path):
    folder = save_for_hub(subnet, tmp_path / "encoder", tokenizer=tokenizer, pooling="mean")
    np.testing.assert_allclose(encode(folder), pooled(subnet, tokenizer, "mean"), atol=1e-6)


def test_embeddings_can_have_length_one_and_prompts(subnet, tokenizer, tmp_path):
    options = {"normalize": True, "prompts": {"query": "the moon was "}, "max_seq_length": 9}
    folder = save_for_hub(subnet, tmp_path / "encoder", tokenizer=tokenizer, pooling="mean", **options)
    assert read_sentence_encoder(folder) == {"pooling": "mean", **options}
    embedding = encode(folder, ["a cat"], prompt_name="query")
    np.testing.assert_allclose(np.linalg.norm(embedding), 1, atol=1e-6)
    np.testing.assert_allclose(embedding, encode(folder, ["the moon was a cat"]), atol=1e-6)
    np.testing.assert_array_equal(*encode(folder, ["the cat sat on the mat .", "the cat sat on the mat . and ran"]))


def test_a_text_is_never_longer_than_the_model_can_read(subnet, tokenizer, tmp_path):
    """As in sentence-transformers, no number of tokens that an original or a tokenizer names can break the model."""
    folder = save_for_hub(subnet, tmp_path / "encoder", tokenizer=tokenizer, pooling="mean", max_seq_length=512)
    assert read_sentence_encoder(folder)["max_seq_length"] == 24
    encode(folder)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_written_for_all_readers(pooling, subnet, tokenizer, tmp_path):
    """text-embeddings-inference needs the first four flags and the length; sentence-transformers 6 writes the mode."""
    folder = save_for_hub(subnet, tmp_path / "encoder", tokenizer=tokenizer, pooling=pooling)
    written = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert written["pooling_mode"] == pooling
    assert {name: written[f"pooling_mode_{name}"] for name in ("cls_token", "mean_tokens", "max_tokens")} == {
        "cls_token": pooling == "cls", "mean_tokens": pooling == "mean", "max_tokens": False,
    }  # fmt: skip
    assert written["pooling_mode_mean_sqrt_len_tokens"] is False
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 24


def test_push_publishes_a_sentence_encoder(subnet, tokenizer, server):
    push_to_hub(subnet, "user/name", tokenizer=tokenizer, pooling="cls", normalize=True)
    assert read_sentence_encoder("user/name") == {"pooling": "cls", "normalize": True, "max_seq_length": 24}


def test_cutting_on_disk_keeps_the_pooling(tokenizer, tmp_path):
    supernet = tiny_model(SuperShaperModel)
    save_for_hub(supernet, tmp_path / "supernet", tokenizer=tokenizer, pooling="cls")
    folder = extract_from_folder(tmp_path / "supernet", SHAPE, tmp_path / "subnet")
    np.testing.assert_allclose(encode(folder), pooled(supernet.extract_subnet(SHAPE), tokenizer, "cls"), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling='max' is unknown. Allowed: 'mean', 'cls'"),
        ({"pooling": "mean", "max_seq_length": 0}, "max_seq_length=0 must be an integer of at least 1"),
        ({"pooling": "mean", "tokenizer": None}, "needs a tokenizer"),
        ({"normalize": True}, "are for sentence encoders: give pooling='mean' or"),
    ],
)
def test_what_cannot_be_a_sentence_encoder_is_refused(options, message, subnet, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_for_hub(subnet, tmp_path / "encoder", **{"tokenizer": tokenizer} | options)
    assert list(tmp_path.iterdir()) == []


# Reading


@pytest.mark.parametrize("written_by", ["hand", "sentence-transformers"])
def test_a_supernet_takes_the_place_of_its_original(written_by, original, tokenizer, tmp_path):
    """It pools like the original, cuts at the same token, and gives embeddings of the same length."""
    if written_by == "hand":
        write_steps(original, flags("cls"), ["Transformer", "Pooling", "Normalize"])
        expected = {"pooling": "cls", "normalize": True, "max_seq_length": 16}
    else:
        encoder = SentenceTransformer(str(original), device="cpu")  # makes one with mean pooling of a bare BERT
        encoder.max_seq_length = 16
        encoder.save(str(tmp_path / "encoder"))
        original = tmp_path / "encoder"
        expected = {"pooling": "mean", "normalize": False}
    options = read_sentence_encoder(original)
    assert expected.items() <= options.items()
    supernet = SuperShaperModel.from_bert(str(original), width_choices=[8, 48])
    tokenizer = type(tokenizer).from_pretrained(original)
    folder = save_for_hub(supernet, tmp_path / "supernet", tokenizer=tokenizer, **options)
    np.testing.assert_allclose(encode(folder), encode(original), atol=1e-6)
    np.testing.assert_array_equal(*encode(folder, [" ".join(WORDS[:14]), " ".join(WORDS)]))  # 16 tokens, then 17


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (flags("mean"), "mean"),
        (flags("cls"), "cls"),
        (flags("max"), None),
        (flags("mean", "max"), None),
        (flags(), None),
        ({"embedding_dimension": 48, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"embedding_dimension": 48, "pooling_mode": ["mean"]}, "mean"),
        ({"embedding_dimension": 48, "pooling_mode": ["mean", "cls"]}, None),
        ({"embedding_dimension": 48, "pooling_mode": "lasttoken"}, None),
    ],
)
def test_pooling_is_read(pooling, expected, tmp_path):
    write_steps(tmp_path, pooling)
    assert read_pooling(tmp_path) == expected


def test_other_steps_are_no_pooling_of_ours(tmp_path):
    """A subnet cannot have the further layer of such an encoder, so it does not pretend to be one."""
    write_steps(tmp_path, flags("mean"), ["Transformer", "Pooling", "Dense", "Normalize"])
    assert read_pooling(tmp_path) is None


def test_no_sentence_encoder_has_no_pooling(folder, tmp_path):
    assert read_pooling(folder) is None
    assert read_pooling(tmp_path / "nothing" / "at all") is None


def test_pooling_is_read_from_the_hub(server, folder):
    assert read_pooling("user/name") is None  # there is no such repository
    push_folder(folder, "user/name")
    assert read_pooling("user/name") is None
    write_steps(folder, flags("cls"))
    push_folder(folder, "user/name")
    assert read_pooling("user/name") == "cls"


def test_offline_there_is_no_pooling():
    assert read_pooling("user/name") is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", "{", r"modules\.json.* JSON"),
        ("modules.json", "{}", r"modules\.json must hold a JSON list"),
        (
            "sentence_bert_config.json",
            '{"max_seq_length": "16"}',
            r"_config\.json: max_seq_length='16' must be an integer",
        ),
    ],
)
def test_damaged_files_are_named(file, content, message, tmp_path):
    write_steps(tmp_path, flags("mean"))
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pooling(tmp_path)
