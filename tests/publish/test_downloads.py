"""What was published loads everywhere, with the package and without, and damage is found."""

import os
import subprocess
import sys
from pathlib import Path

import publish_loading
import pytest
import torch
from conftest import SPECIAL_TOKENS, WORDS, assert_same, run, tiny_model
from hub_server import HubServer
from huggingface_hub import HfApi
from publish_loading import SENTENCES, embed, load_everything
from publishing import CODE, FIRST, IGNORE_UPLOADS, MODEL_FILES, SHAPE, files, point_client_at, titles
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForMaskedLM, BertTokenizer, pipeline

from supershaper_hf import SuperShaperForMaskedLM
from supershaper_hf.model.configuration_supershaper import AUTO_MAP
from supershaper_hf.publish.hub import push_folder, push_to_hub


pytestmark = IGNORE_UPLOADS


# Damage on the way back


def test_truncated_download_is_an_error_and_heals(folder, server):
    push_folder(folder, "user/name")
    server.corrupt("user/name", "model.safetensors", "truncate")
    with pytest.raises(OSError, match=r"should be of size \d+ but has size \d+.*model\.safetensors"):
        AutoModelForMaskedLM.from_pretrained("user/name")
    server.corruptions.clear()
    loaded = AutoModelForMaskedLM.from_pretrained("user/name")
    assert_same(loaded.state_dict(), SuperShaperForMaskedLM.from_pretrained(folder).state_dict(), atol=0)


def test_flipped_bit_in_a_download_is_found_by_hf_cache_verify(folder, server):
    def mismatches():
        return [mismatch["path"] for mismatch in HfApi().verify_repo_checksums("user/name").mismatches]

    push_folder(folder, "user/name")
    server.corrupt("user/name", "model.safetensors", "flip")
    AutoModelForMaskedLM.from_pretrained("user/name")  # of the right length: neither the client nor we notice
    assert mismatches() == ["model.safetensors"]
    server.corruptions.clear()
    AutoModelForMaskedLM.from_pretrained("user/name", force_download=True)
    assert mismatches() == []


@pytest.mark.parametrize("position", [7, 8], ids=["header length", "header"])
def test_damaged_header_is_named(position, folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[position] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(OSError, match=r"name'\)? are damaged or cut short .*force_download=True"):
        SuperShaperForMaskedLM.from_pretrained(folder)


# With the package and without


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Publish a subnet, also as a sentence encoder. Load every head here, with the package, and in a process without.

    Nobody can answer a question in that process: its standard input is closed.

    Returns:
        The server, the subnet, and what each process saw, by "installed" and "missing", the state of the package.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    subnet = tiny_model().extract_subnet(SHAPE)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    auto_classes = [name for name in AUTO_MAP if name != "AutoConfig"]
    with HubServer() as server, point_client_at(server, folder / "cache"):
        push_to_hub(subnet, "user/name", tokenizer=tokenizer)
        push_to_hub(subnet, "user/encoder", tokenizer=tokenizer, pooling="mean")
        script = Path(publish_loading.__file__)
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder / "missing"), "Stock", *auto_classes],
            env={**os.environ, **server.environment(folder / "missing-cache")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        here = load_everything(auto_classes)
        here["embeddings"] = embed(SentenceTransformer("user/encoder", device="cpu"))
        here["pipeline"] = pipeline("fill-mask", model="user/name")("a [MASK] .", top_k=3)
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed
        elsewhere = torch.load(folder / "missing") | {"printed": printed}
        yield server, subnet, {"installed": here, "missing": elsewhere}


@pytest.mark.parametrize("package", ["installed", "missing"])
def test_published_model_computes_the_same(package, loaded):
    _, subnet, results = loaded
    seen = results[package]
    assert_same([seen["logits"]], run(subnet, seen["encoded"]), atol=0)


@pytest.mark.parametrize("package", ["installed", "missing"])
def test_published_tokenizer_is_the_same(package, loaded, tokenizer):
    seen = loaded[2][package]
    assert seen["vocabulary"] == tokenizer.get_vocab()
    assert_same(seen["encoded"], dict(tokenizer("the big cat [MASK] on the moon .", return_tensors="pt")), atol=0)


@pytest.mark.parametrize("package", ["installed", "missing"])
@pytest.mark.parametrize("auto_class", [name for name in AUTO_MAP if name != "AutoConfig"])
def test_every_head_loads_from_the_published_masked_lm(auto_class, package, loaded):
    _, subnet, results = loaded
    name, module, encoder = results[package][auto_class]
    assert name == AUTO_MAP[auto_class].split(".")[1]
    assert module.startswith("supershaper_hf." if package == "installed" else "transformers_modules.")
    assert_same(encoder, subnet.bert.encoder.state_dict(), atol=0)


@pytest.mark.parametrize("package", ["installed", "missing"])
def test_published_sentence_encoder_computes_the_same(package, loaded, tokenizer):
    """The process without the package runs the code in the card."""
    _, subnet, results = loaded
    states = [run(subnet.bert, tokenizer(sentence, return_tensors="pt"))[0] for sentence in SENTENCES]
    assert_same(results[package]["embeddings"], torch.cat([each.mean(1) for each in states]), atol=1e-6)


def test_pipeline_of_the_published_model_fills_masks(loaded, tokenizer):
    filled = loaded[2]["installed"]["pipeline"]
    assert len(filled) == 3
    assert {"score", "token_str", "sequence"} <= filled[0].keys()


def test_without_the_package_push_is_that_of_transformers(loaded):
    server, _, _ = loaded
    assert titles(server, "user/copy") == [FIRST, "Stock"]
    commit = server.repos["user/copy"].at("main").oid
    assert loaded[2]["missing"]["pushed"] == ("CommitInfo", f"{server.endpoint}/user/copy/commit/{commit}")
    copy = files(server, "user/copy")
    assert set(copy) == MODEL_FILES
    for path in {"model.safetensors"} | CODE:
        assert copy[path] == files(server)[path]


def test_code_in_the_card_runs_without_the_package_and_without_a_question(loaded):
    seen = loaded[2]["missing"]
    assert seen["card"] == ["SuperShaperForMaskedLM", "BertTokenizer"]
    assert "[y/N]" not in seen["printed"]  # transformers asks whether it may run the code, and waits 15 seconds
    assert {"score", "token_str", "sequence"} <= seen["filled"][0].keys()


def test_tokenizer_needs_no_code_and_no_question_if_told(loaded, tokenizer):
    """Without `trust_remote_code=False` transformers asks: it reads config.json before the tokenizer's files."""
    vocabulary, loaded_code = loaded[2]["missing"]["tokenizer alone"]
    assert vocabulary == tokenizer.get_vocab()
    assert loaded_code == []
