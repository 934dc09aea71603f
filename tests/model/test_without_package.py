"""Saved models load, run and are cut in a process that cannot import the package, with trust_remote_code."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HEADS, PER_HEAD_BY_WIDTH, assert_same, run, tiny_batch, tiny_model
from transformers import AutoModelForMaskedLM, AutoTokenizer

from supershaper_hf import SuperShaperForMaskedLM, extract_from_folder


PUBLISHED = Path(__file__).with_name("published_2026")
EXPECTED = json.loads((PUBLISHED / "expected_logits.json").read_text())

WITHOUT_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "supershaper_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
import transformers

jobs_file, results_file, published, text = sys.argv[1:]
for call in (
    lambda: transformers.AutoConfig.from_pretrained(published),
    lambda: transformers.AutoModelForMaskedLM.from_pretrained(published),
    lambda: transformers.AutoModelForMaskedLM.from_pretrained(published, trust_remote_code=False),
    lambda: transformers.pipeline("fill-mask", model=published),
):
    try:
        call()
    except ValueError as error:
        print("refused:", " ".join(str(error).split()))
tokenizer = transformers.AutoTokenizer.from_pretrained(published, trust_remote_code=False)
print("tokenized:", tokenizer(text)["input_ids"])

results = {}
for name, (auto_class, folder, batch, shape, save_to) in torch.load(jobs_file).items():
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    if shape:
        model = model.extract_subnet(shape)
    if save_to:
        model.save_pretrained(save_to)
    with torch.no_grad():
        results[name] = (type(model).__name__, list(model(**batch).to_tuple()))
torch.save(results, results_file)

for call in (
    lambda: model.from_bert("bert"),
    lambda: model.from_original("pytorch_model.bin", model.config),
    lambda: model.push_to_hub("user/name", tokenizer="tokenizer"),
):
    try:
        call()
    except (ImportError, TypeError) as error:
        print(error)
"""


def published(kind, parent):
    """Put a published folder together, code included."""
    shutil.copytree(PUBLISHED / kind, parent / kind)
    shutil.copytree(PUBLISHED / "code", parent / kind, dirs_exist_ok=True)
    return parent / kind


def published_inputs():
    return AutoTokenizer.from_pretrained(PUBLISHED / "subnet")(EXPECTED["text"], return_tensors="pt")


def logits_at_the_mask(outputs):
    return outputs[0][0, 3]


@pytest.fixture(scope="module")
def without_package(tmp_path_factory):
    """Load, cut, save and run every head in one process that cannot import the package.

    Returns:
        The folder of the models, the results by name as (class name, outputs), and what the process printed.
    """
    folder = tmp_path_factory.mktemp("without_package")
    jobs = {}
    for model_class in HEADS:
        name, batch = model_class.__name__, tiny_batch(model_class)
        auto_class = name.replace("SuperShaper", "AutoModel").replace("ModelModel", "Model")
        supernet = tiny_model(model_class, **PER_HEAD_BY_WIDTH)
        supernet.save_pretrained(folder / name)
        supernet.extract_subnet([8, 0, 36]).save_pretrained(folder / f"{name}-subnet")
        jobs[name] = (auto_class, str(folder / name), batch, None, None)
        jobs[f"{name}-subnet"] = (auto_class, str(folder / f"{name}-subnet"), batch, None, None)
        jobs[f"{name}-cut"] = (auto_class, str(folder / name), batch, [8, 0, 36], str(folder / f"{name}-cut"))
        jobs[f"{name}-again"] = (auto_class, str(folder / f"{name}-cut"), batch, None, None)
        masked_lm = str(folder / "SuperShaperForMaskedLM")
        jobs[f"{name}-of-masked-lm"] = (auto_class, masked_lm, batch, None, str(folder / f"{name}-of-masked-lm"))
    for kind in ("supernet", "subnet"):
        published(kind, folder / "published")
        jobs[f"published {kind}"] = (
            "AutoModelForMaskedLM",
            str(folder / "published" / kind),
            dict(published_inputs()),
            None,
            None,
        )
    cut = (
        "AutoModelForMaskedLM",
        str(folder / "published" / "supernet"),
        dict(published_inputs()),
        EXPECTED["shape"],
        None,
    )
    jobs["published supernet, cut"] = cut
    torch.save(jobs, folder / "jobs.pt")
    command = [sys.executable, "-c", WITHOUT_PACKAGE, folder / "jobs.pt", folder / "results.pt"]
    command += [folder / "published" / "supernet", EXPECTED["text"]]
    nobody = subprocess.DEVNULL  # answers when transformers asks whether the code may run
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=nobody)
    assert process.returncode == 0, process.stderr
    return folder, torch.load(folder / "results.pt"), process.stdout


@pytest.mark.parametrize("kind", ["", "-subnet", "-cut", "-again"], ids=["supernet", "subnet", "cut", "cut and saved"])
def test_without_the_package_models_load_and_are_cut(without_package, model_class, kind):
    _, results, _ = without_package
    supernet = tiny_model(model_class, **PER_HEAD_BY_WIDTH)
    expected = run(supernet, tiny_batch(model_class), shape=[8, 0, 36] if kind else None)
    name, outputs = results[model_class.__name__ + kind]
    assert name == model_class.__name__
    assert_same(outputs, expected)


def test_without_the_package_every_auto_class_loads_a_masked_lm_folder(without_package, model_class):
    folder, results, _ = without_package
    name = f"{model_class.__name__}-of-masked-lm"
    assert results[name][0] == model_class.__name__
    loaded = model_class.from_pretrained(folder / name)
    pretrained = tiny_model(**PER_HEAD_BY_WIDTH)
    assert_same(loaded.base_model.encoder.state_dict(), pretrained.bert.encoder.state_dict(), atol=0)


def test_model_saved_without_the_package_loads_with_it(without_package, model_class):
    folder, results, _ = without_package
    subnet = model_class.from_pretrained(folder / f"{model_class.__name__}-cut")
    assert_same(run(subnet, tiny_batch(model_class)), results[f"{model_class.__name__}-cut"][1])


@pytest.mark.parametrize(
    "message",
    [
        "from_bert needs the package: pip install supershaper-hf",
        "from_original needs the package: pip install supershaper-hf",
        "Without the package, publish the tokenizer with tokenizer.push_to_hub.",
    ],
)
def test_methods_that_need_the_package_say_so(without_package, message):
    assert message in without_package[2].splitlines()


def test_without_package_and_flag_every_loader_names_the_flag(without_package):
    """Where somebody sits at a terminal, transformers asks first."""
    folder, _, printed = without_package
    refusals = re.findall("refused: (.*)", printed)  # the question may stand before it, on the same line
    assert len(refusals) == 4
    for refusal in refusals:
        assert f"{folder / 'published' / 'supernet'} contains custom code" in refusal
        assert "Please pass the argument `trust_remote_code=True`" in refusal


def test_tokenizer_needs_neither_package_nor_code(without_package):
    """With `trust_remote_code=False` it loads without a question. Without this option, transformers asks first."""
    assert f"tokenized: {published_inputs()['input_ids'][0].tolist()}" in without_package[2].splitlines()


# Folders that were published in 2026


@pytest.mark.parametrize("kind", ["supernet", "subnet"])
@pytest.mark.parametrize("loader", [AutoModelForMaskedLM, SuperShaperForMaskedLM], ids=lambda loader: loader.__name__)
def test_published_folder_gives_the_logits_it_gave(kind, loader, tmp_path):
    model = loader.from_pretrained(published(kind, tmp_path))
    assert type(model) is SuperShaperForMaskedLM
    assert_same(logits_at_the_mask(run(model, published_inputs())), torch.tensor(EXPECTED[kind]))


@pytest.mark.parametrize("kind", ["supernet", "subnet", "supernet, cut"])
def test_published_folder_gives_the_logits_it_gave_without_the_package(kind, without_package):
    name, outputs = without_package[1][f"published {kind}"]
    assert name == "SuperShaperForMaskedLM"
    assert_same(logits_at_the_mask(outputs), torch.tensor(EXPECTED["subnet" if "cut" in kind else kind]))


def test_published_supernet_is_cut_into_the_published_subnet(tmp_path):
    supernet = SuperShaperForMaskedLM.from_pretrained(published("supernet", tmp_path))
    in_memory = supernet.extract_subnet(EXPECTED["shape"])
    on_disk = extract_from_folder(tmp_path / "supernet", EXPECTED["shape"], tmp_path / "cut")
    on_disk = SuperShaperForMaskedLM.from_pretrained(on_disk)
    expected = SuperShaperForMaskedLM.from_pretrained(published("subnet", tmp_path))
    for subnet in (in_memory, on_disk):
        assert_same(subnet.state_dict(), expected.state_dict(), atol=1e-6)
        assert_same(logits_at_the_mask(run(subnet, published_inputs())), torch.tensor(EXPECTED["subnet"]))


def test_published_supernet_saved_again_has_todays_code(tmp_path):
    model = SuperShaperForMaskedLM.from_pretrained(published("supernet", tmp_path))
    model.save_pretrained(tmp_path / "again")
    today = Path(sys.modules[SuperShaperForMaskedLM.__module__].__file__).parent
    for file in (tmp_path / "again").glob("*.py"):
        assert file.read_text() == (today / file.name).read_text()
    again = SuperShaperForMaskedLM.from_pretrained(tmp_path / "again")
    assert_same(logits_at_the_mask(run(again, published_inputs())), torch.tensor(EXPECTED["supernet"]))
