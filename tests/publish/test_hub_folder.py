"""A folder written for the Hub is complete, or is not there at all."""

import json

import pytest
from conftest import SPECIAL_TOKENS, assert_same, tiny_bert_config, tiny_model
from publishing import MODEL_FILES, TOKENIZER_FILES, contents
from transformers import AutoTokenizer, BertForMaskedLM, BertTokenizer

from supershaper_hf import SuperShaperForMaskedLM
from supershaper_hf.model.configuration_supershaper import AUTO_MAP
from supershaper_hf.publish.hub import save_for_hub


def test_saved_folder_is_complete(folder, subnet):
    assert set(contents(folder)) == MODEL_FILES | TOKENIZER_FILES
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert_same(SuperShaperForMaskedLM.from_pretrained(folder).state_dict(), subnet.state_dict(), atol=0)


def test_tokenizer_can_be_left_out(subnet, tmp_path):
    assert set(contents(save_for_hub(subnet, tmp_path / "subnet"))) == MODEL_FILES


def test_weights_can_be_split(subnet, tmp_path):
    folder = save_for_hub(subnet, tmp_path / "subnet", max_shard_size="50KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert_same(SuperShaperForMaskedLM.from_pretrained(folder).state_dict(), subnet.state_dict(), atol=0)


def test_folder_with_files_is_refused(subnet, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not an empty folder\. Choose another one"):
        save_for_hub(subnet, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_tokenizer_of_another_vocabulary_is_refused(subnet, tmp_path):
    large = BertTokenizer(vocab={word: index for index, word in enumerate([*SPECIAL_TOKENS, *map(str, range(70))])})
    with pytest.raises(ValueError, match=r"has 75 tokens, but the model has vocab_size=61: .*resize_token_embeddings"):
        save_for_hub(subnet, tmp_path / "subnet", tokenizer=large)
    assert list(tmp_path.iterdir()) == []


def test_crash_while_saving_leaves_no_folder(subnet, tokenizer, tmp_path, monkeypatch):
    def write_half(partial, **kwargs):
        (partial / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(subnet, "save_pretrained", write_half)
    with pytest.raises(RuntimeError, match="disk full"):
        save_for_hub(subnet, tmp_path / "subnet", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_new_folder_replaces_the_old_one_if_told(subnet, folder):
    other = tiny_model().extract_subnet([36, 36, 36])
    with pytest.raises(FileExistsError):
        save_for_hub(other, folder)
    save_for_hub(other, folder, replace=True)
    assert set(contents(folder)) == MODEL_FILES
    assert SuperShaperForMaskedLM.from_pretrained(folder).config.hidden_sizes == [36, 36, 36]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_everybody_may_read_every_file(max_shard_size, subnet, tokenizer, tmp_path):
    """Safetensors writes its files for their owner only."""
    folder = save_for_hub(subnet, tmp_path / "subnet", tokenizer=tokenizer, max_shard_size=max_shard_size)
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_configuration_names_its_own_class(tmp_path):
    """Not the class of the BERT that the weights came from, even if the model was never saved before."""
    supernet = SuperShaperForMaskedLM.from_bert(BertForMaskedLM(tiny_bert_config()), width_choices=[8, 48])
    for name, model in {"supernet": supernet, "subnet": supernet.extract_subnet([8, 0, 48])}.items():
        config = json.loads((save_for_hub(model, tmp_path / name) / "config.json").read_text())
        assert config["architectures"] == ["SuperShaperForMaskedLM"]


def test_last_call_of_the_tokenizer_is_not_published(subnet, tokenizer, folder, tmp_path):
    """Truncation and padding stay in a tokenizer until its next call."""
    before = contents(folder)
    tokenizer(["a cat", "the dog ran ."], truncation=True, max_length=4, padding="max_length")
    kept = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    assert None not in kept
    after = contents(save_for_hub(subnet, tmp_path / "next", tokenizer=tokenizer, repo_id="user/name"))
    assert after == before
    assert json.loads(after["tokenizer.json"])["truncation"] is None
    assert json.loads(after["tokenizer.json"])["padding"] is None
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == kept


def test_where_the_tokenizer_came_from_is_not_published(subnet, folder, tmp_path):
    """Whether it was loaded from a folder, and without a network, is what the library writes."""
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    loaded.save_pretrained(tmp_path / "saved")
    assert "local_files_only" in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    save_for_hub(subnet, tmp_path / "next", tokenizer=loaded)
    written = json.loads((tmp_path / "next" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & written.keys()
    assert loaded.init_kwargs["local_files_only"]


@pytest.mark.parametrize(("limit", "saved"), [(None, 24), (512, 24), (12, 12)])
def test_tokenizer_is_published_with_a_length_that_the_model_can_read(limit, saved, subnet, tokenizer, tmp_path):
    tokenizer.model_max_length = before = limit or tokenizer.model_max_length
    folder = save_for_hub(subnet, tmp_path / "next", tokenizer=tokenizer)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == saved
    assert tokenizer.model_max_length == before
