"""PEFT: LoRA trained on subnets and on supernets at full width, saved, loaded, merged, and cut."""

import copy

import pytest
import torch
from conftest import assert_same, randomize, tiny_batch, tiny_config, tiny_model
from transformers import Trainer, TrainingArguments

from supershaper_hf import SuperShaperForSequenceClassification


peft = pytest.importorskip("peft", reason="PEFT is not installed; `make test-neighbours` installs it")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT 0.21 uses a name that transformers renames
NARROW = [8, 20, 36]


def lora(model):
    """Adapters that compute something: new ones of PEFT add 0."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["query", "value", "intermediate.dense"],
        modules_to_save=["classifier"],
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


@pytest.fixture(params=["subnet", "supernet"])
def model(request):
    supernet = tiny_model(SuperShaperForSequenceClassification, num_labels=2)
    return supernet if request.param == "supernet" else supernet.extract_subnet(NARROW)


def test_adapters_learn_and_the_model_does_not(model, tmp_path):
    adapted = lora(model)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    columns = tiny_batch(batch=8) | {"labels": torch.arange(8) % 2}
    rows = [{name: values[row] for name, values in columns.items()} for row in range(8)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=adapted, args=args, train_dataset=rows).train()
    for name, parameter in adapted.named_parameters():
        learns = "lora_" in name or "modules_to_save" in name
        assert torch.equal(parameter, before[name]) != learns, name


def test_adapters_are_saved_loaded_and_merged(model, tmp_path):
    adapted, batch = lora(model), tiny_batch()
    expected = adapted(**batch).logits.detach()
    assert (expected - model(**batch).logits).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_same(loaded(**batch).logits.detach(), expected)
    assert_same(loaded.merge_and_unload()(**batch).logits.detach(), expected)


def test_merged_adapters_are_narrowed_and_cut():
    supernet, batch = tiny_model(SuperShaperForSequenceClassification, num_labels=2), tiny_batch()
    merged = lora(supernet).merge_and_unload()
    narrow = merged(**batch, shape=NARROW).logits.detach()
    assert (narrow - supernet(**batch, shape=NARROW).logits).abs().max() > 1e-2
    assert_same(merged.extract_subnet(NARROW)(**batch).logits.detach(), narrow)


def test_adapters_that_are_not_merged_are_refused_at_narrow_shapes():
    adapted, batch = lora(tiny_model(SuperShaperForSequenceClassification, num_labels=2)), tiny_batch()
    with pytest.raises(TypeError, match=r"merge_and_unload\(\)"):
        adapted(**batch, shape=NARROW)
    with pytest.raises(TypeError, match=r"merge_and_unload\(\)"):
        adapted.base_model.model.extract_subnet(NARROW)


def test_adapters_of_a_fresh_head_start_at_the_model():
    """As PEFT makes them, they add nothing."""
    model = randomize(SuperShaperForSequenceClassification(tiny_config(num_labels=2))).eval()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    adapted, batch = peft.get_peft_model(copy.deepcopy(model), config).eval(), tiny_batch()
    assert_same(adapted(**batch).logits.detach(), model(**batch).logits.detach(), atol=1e-6)
