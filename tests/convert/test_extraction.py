import json
import re
import shutil
from unittest import mock

import pytest
import torch
from conftest import PER_HEAD_BY_WIDTH, assert_same, randomize, run, tiny_batch, tiny_config, tiny_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from supershaper_hf import SuperShaperForMaskedLM, extract_from_folder


@pytest.fixture
def source(tmp_path):
    """A saved supernet."""
    tiny_model(**PER_HEAD_BY_WIDTH).save_pretrained(tmp_path / "supernet")
    return tmp_path / "supernet"


@pytest.mark.parametrize("shape", [[8, 20, 36], [48, 48, 48], [0, 36, 0]], ids=str)
def test_extraction_between_folders_equals_extraction_in_memory(model_class, elasticity, shape, tmp_path):
    supernet = tiny_model(model_class, **elasticity)
    supernet.save_pretrained(tmp_path / "supernet")
    target = extract_from_folder(tmp_path / "supernet", shape, tmp_path / "subnet")
    subnet, expected = model_class.from_pretrained(target), supernet.extract_subnet(shape)
    assert subnet.config.to_json_string() == expected.config.to_json_string()
    assert_same(subnet.state_dict(), expected.state_dict(), atol=1e-6)


def test_sharded_supernet_is_cut(tmp_path):
    supernet = tiny_model()
    supernet.save_pretrained(tmp_path / "supernet", max_shard_size="50KB")
    assert len(list((tmp_path / "supernet").glob("model-*-of-*.safetensors"))) > 2
    extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")
    subnet = SuperShaperForMaskedLM.from_pretrained(tmp_path / "subnet")
    assert_same(subnet.state_dict(), supernet.extract_subnet([8, 0, 36]).state_dict(), atol=1e-6)


def test_untied_supernet_is_cut(tmp_path):
    supernet = tiny_model(tie_word_embeddings=False)
    supernet.save_pretrained(tmp_path / "supernet")
    extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")
    subnet = SuperShaperForMaskedLM.from_pretrained(tmp_path / "subnet")
    assert_same(run(subnet, tiny_batch()), run(supernet, tiny_batch(), shape=[8, 0, 36]))


def test_bfloat16_supernet_gives_a_bfloat16_subnet(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "supernet")
    extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")
    assert {tensor.dtype for tensor in load_file(tmp_path / "subnet" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert SuperShaperForMaskedLM.from_pretrained(tmp_path / "subnet").dtype == torch.bfloat16


def test_subnet_folder_holds_no_more_than_the_subnet(source, tmp_path):
    extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    stored = load_file(tmp_path / "subnet" / "model.safetensors").values()
    subnet = SuperShaperForMaskedLM.from_pretrained(tmp_path / "subnet")
    assert sum(tensor.numel() for tensor in stored) == sum(parameter.numel() for parameter in subnet.parameters())


def test_extraction_between_folders_holds_no_more_than_the_subnet_in_memory(source, tmp_path):
    with mock.patch.object(SuperShaperForMaskedLM, "save_pretrained", autospec=True) as save:
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    for tensor in save.call_args.kwargs["state_dict"].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_tokenizer_comes_along(source, tokenizer, tmp_path):
    tokenizer.save_pretrained(source)
    extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    copied = AutoTokenizer.from_pretrained(tmp_path / "subnet")
    assert copied("the cat [MASK] .").input_ids == tokenizer("the cat [MASK] .").input_ids


def test_code_that_a_tokenizer_names_does_not_come_along(source, tokenizer, tmp_path):
    """It lies elsewhere, perhaps in a repository of somebody else."""
    tokenizer.save_pretrained(source)
    file = source / "tokenizer_config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"auto_map": {"AutoTokenizer": ["somebody/else--evil.Tokenizer", None]}}))
    folder = extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    assert json.loads((folder / "tokenizer_config.json").read_text()) == before


def test_crash_while_saving_leaves_no_folder(source, tmp_path, monkeypatch):
    def crash(self, folder, **kwargs):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("disk full")

    monkeypatch.setattr(SuperShaperForMaskedLM, "save_pretrained", crash)
    with pytest.raises(RuntimeError, match="disk full"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    assert list(tmp_path.iterdir()) == [source]


def test_occupied_target_is_refused_before_anything_is_read(source):
    before = sorted(source.iterdir())
    with pytest.raises(FileExistsError, match="supernet exists and is not an empty folder"):
        extract_from_folder("missing", [8, 0, 36], source)
    assert sorted(source.iterdir()) == before


def test_wrong_shape_is_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(ValueError, match="width 40 of layer 3 is not one of the width choices"):
        extract_from_folder(source, [8, 20, 40], tmp_path / "subnet")
    assert list(tmp_path.iterdir()) == [source]


def test_subnet_folder_is_refused(source, tmp_path):
    extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    with pytest.raises(ValueError, match="it is not elastic"):
        extract_from_folder(tmp_path / "subnet", [8, 36], tmp_path / "again")


def test_folder_without_weights_is_refused(source, tmp_path):
    (source / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"needs model\.safetensors, or model\.safetensors\.index\.json and its shards"
    ):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


def test_truncated_weights_are_named(source, tmp_path):
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(OSError, match=r"model\.safetensors is damaged or cut short .* Copy the file again"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")
    assert list(tmp_path.iterdir()) == [source]


def test_weights_of_another_size_are_named(source, tmp_path):
    tiny_config(intermediate_size=96).save_pretrained(source)
    message = r"layer\.0\.intermediate\.dense\.weight is \[80, 48\], but config\.json says \[96, 48\]"
    with pytest.raises(ValueError, match=message):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


def test_weights_of_another_head_are_named(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["SuperShaperForQuestionAnswering"]}))
    with pytest.raises(ValueError, match="has no tensor 'qa_outputs"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


def test_unknown_head_is_named(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match="holds a BertForMaskedLM; allowed: SuperShaperForMaskedLM"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


# Where the weights are


def reshard(folder, names=lambda name: name):
    """Save a supernet in shards, and return its index, with the file names changed by `names`."""
    supernet = randomize(tiny_model(**PER_HEAD_BY_WIDTH), seed=5)
    supernet.save_pretrained(folder, max_shard_size="50KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {tensor: names(file) for tensor, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return index


def test_stale_index_beside_a_single_file_is_passed_over(source, tmp_path):
    """`from_pretrained` reads the single file, so extraction does."""
    reshard(tmp_path / "old")
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, source)
    subnet = SuperShaperForMaskedLM.from_pretrained(extract_from_folder(source, [8, 0, 36], tmp_path / "subnet"))
    expected = SuperShaperForMaskedLM.from_pretrained(source).extract_subnet([8, 0, 36])
    assert_same(subnet.state_dict(), expected.state_dict(), atol=1e-6)


@pytest.mark.parametrize("weights", ["model.safetensors", "other.safetensors"])
def test_weights_that_config_names_are_read(weights, source, tmp_path):
    """`transformers_weights` of a config.json decides what `from_pretrained` reads."""
    randomize(tiny_model(**PER_HEAD_BY_WIDTH), seed=5).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", source / "other.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": weights}))
    subnet = SuperShaperForMaskedLM.from_pretrained(extract_from_folder(source, [8, 0, 36], tmp_path / "subnet"))
    expected = SuperShaperForMaskedLM.from_pretrained(source).extract_subnet([8, 0, 36])
    assert_same(subnet.state_dict(), expected.state_dict(), atol=1e-6)


@pytest.mark.parametrize("outside", ["../{}", "{folder}/{}", "shards/../../{}", "..\\{}", "C:\\{}"])
def test_index_that_leads_out_of_the_folder_is_refused(outside, tmp_path):
    reshard(tmp_path / "supernet", lambda name: outside.format(name, folder=tmp_path))
    for shard in (tmp_path / "supernet").glob("model-*"):
        shutil.copy(shard, tmp_path)
    with pytest.raises(ValueError, match="weights have to be files in this folder"):
        extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")
    assert not (tmp_path / "subnet").exists()


def test_config_that_leads_out_of_the_folder_is_refused(source, tmp_path):
    shutil.copy(source / "model.safetensors", tmp_path)
    config = json.loads((source / "config.json").read_text())
    for name in ("../model.safetensors", str(tmp_path / "model.safetensors"), 3, ["model.safetensors"]):
        (source / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(
            ValueError, match=re.escape(f"names {name!r} as a file of its weights, but weights have to be")
        ):
            extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_folder_of_symbolic_links_is_cut(sharded, tmp_path):
    """The cache of the Hub holds files as blobs, and a snapshot of links to them."""
    supernet = tiny_model()
    supernet.save_pretrained(tmp_path / "blobs", max_shard_size="50KB" if sharded else "1GB")
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    for blob in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshots" / "main" / blob.name).symlink_to(f"../../blobs/{blob.name}")
    target = extract_from_folder(tmp_path / "snapshots" / "main", [8, 0, 36], tmp_path / "subnet")
    subnet = SuperShaperForMaskedLM.from_pretrained(target)
    assert_same(subnet.state_dict(), supernet.extract_subnet([8, 0, 36]).state_dict(), atol=1e-6)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 10**5]
)
def test_damaged_index_is_named(content, tmp_path):
    reshard(tmp_path / "supernet").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not"):
        extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")


def test_missing_shard_is_named(tmp_path):
    reshard(tmp_path / "supernet", lambda name: "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors does not exist"):
        extract_from_folder(tmp_path / "supernet", [8, 0, 36], tmp_path / "subnet")


def test_folder_without_a_configuration_is_refused(source, tmp_path):
    (source / "config.json").unlink()
    with pytest.raises(OSError, match=r"has no config\.json, so it is not a saved model"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


def test_damaged_configuration_is_named(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**5, "hidden_sizes": None}))
    with pytest.raises(ValueError, match=rf"config\.json of '{source}' does not describe a model.*num_hidden_layers"):
        extract_from_folder(source, [8, 0, 36], tmp_path / "subnet")


def test_source_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        extract_from_folder(tmp_path / "missing", [8, 0, 36], tmp_path / "subnet")
