"""A model from `from_pretrained` has its weights mapped to its file: what training does with it."""

import pytest
from conftest import tiny_model
from training_runs import losses, pretrain

from supershaper_hf import SuperShaperForMaskedLM
from supershaper_hf.training import loop
from supershaper_hf.training.sandwich import sandwich_step


@pytest.mark.usefixtures("no_measured_peak")
def test_a_file_that_is_overwritten_during_training_changes_nothing(tokenizer, dataset, tmp_path, monkeypatch):
    """It is also the same to the last bit as training the model that was saved."""
    _, expected = pretrain(tokenizer, dataset, tiny_model(intermediate_size=81))
    tiny_model(intermediate_size=81).save_pretrained(tmp_path)
    model = SuperShaperForMaskedLM.from_pretrained(tmp_path)

    def overwrite_and_step(*arguments):
        with (tmp_path / "model.safetensors").open("r+b") as stream:
            stream.seek(10_000)
            stream.write(bytes(50_000))
        return sandwich_step(*arguments)

    monkeypatch.setattr(loop, "sandwich_step", overwrite_and_step)
    _, summary = pretrain(tokenizer, dataset, model)
    assert losses(summary) == losses(expected)
