"""The folder of a run: whose it is, who may write to it, and which models are good enough to be written."""

import errno
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_same, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import arguments, copied_weights, poison, pretrain, step_records
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast
from transformers.utils import logging

from supershaper_hf.files import lock
from supershaper_hf.training import loop as training_module
from supershaper_hf.training import preparing, progress, run_folder
from supershaper_hf.training.arguments import CHOICES
from supershaper_hf.training.checkpoints import explained, find_damage, list_checkpoints
from supershaper_hf.training.loop import super_pretrain


pytestmark = pytest.mark.usefixtures("no_measured_peak")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# Whose folder it is


@pytest.mark.parametrize(
    "name", ["best", "last", "metrics.jsonl", "evaluation.png", "training_summary.json", "run.json"]
)
def test_files_of_somebody_else_are_not_replaced(tokenizer, dataset, eval_batches, tmp_path, name):
    stranger = tmp_path / name / "notes.txt" if name in ("best", "last") else tmp_path / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("{}")
    before = contents(tmp_path)
    message = f"{tmp_path} holds {name}, but no run of super pre-training there has written it"
    with pytest.raises(FileExistsError, match=re.escape(message)):
        pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("link", [False, True], ids=["folder", "link"])
def test_model_of_somebody_else_beside_our_run_is_not_replaced(tokenizer, dataset, eval_batches, tmp_path, link):
    """The run had no evaluation so far, so it has never written a `best`."""
    folder, stranger = tmp_path / "run", tmp_path / ("elsewhere" if link else "run/best")
    pretrain(tokenizer, dataset, output_dir=str(folder))
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    if link:
        (folder / "best").symlink_to(stranger)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="run holds best, but no run of super pre-training there has written it"):
        pretrain(tokenizer, dataset, eval_batches=eval_batches, max_steps=4, output_dir=str(folder))
    assert contents(tmp_path) == before
    stranger.rename(tmp_path / "safe")
    (folder / "best").unlink(missing_ok=True)
    for steps in (4, 5):
        pretrain(tokenizer, dataset, eval_batches=eval_batches, max_steps=steps, output_dir=str(folder))
    assert (folder / "best" / "config.json").exists()


def test_other_files_in_the_folder_do_no_harm_and_stay(tokenizer, dataset, tmp_path):
    folders = [tmp_path / name for name in ("checkpoint-keep", "checkpoint-500", "search")]
    for folder in folders:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    before = contents(tmp_path)
    changes = {"output_dir": str(tmp_path), "save_steps": 1, "save_total_limit": 1}
    pretrain(tokenizer, dataset, **changes)
    pretrain(tokenizer, dataset, max_steps=4, **changes)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-00000004"]
    assert contents(tmp_path).items() >= before.items()


def test_run_killed_before_its_first_checkpoint_starts_again_in_its_folder(
    tokenizer, dataset, eval_batches, tmp_path, monkeypatch
):
    changes = {"eval_steps": 1, "save_steps": 100, "output_dir": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(training_module.Run, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert (tmp_path / "best").exists()
    assert list_checkpoints(tmp_path) == []
    _, summary = pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
    assert summary.status == "finished"
    assert [record["step"] for record in step_records(summary)] == [1, 2, 3]


def test_checkpoint_alone_shows_that_the_run_is_ours(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    (tmp_path / "run.json").unlink()
    _, summary = pretrain(tokenizer, dataset, max_steps=4, output_dir=str(tmp_path))
    assert summary.progress.step == 4


def test_link_to_a_folder_stays_a_link_and_gets_the_new_model(tokenizer, dataset, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "large-disk" / "model"
    pretrain(tokenizer, dataset, output_dir=str(folder))
    elsewhere.parent.mkdir()
    (folder / "last").rename(elsewhere)
    (folder / "last").symlink_to(elsewhere)
    for steps in (4, 5):
        model, _ = pretrain(tokenizer, dataset, max_steps=steps, output_dir=str(folder))
        assert (folder / "last").is_symlink()
        assert_same(AutoModelForMaskedLM.from_pretrained(elsewhere).state_dict(), model.state_dict(), atol=0)
    assert sorted(path.name for path in elsewhere.parent.iterdir()) == ["model"]


# One writer


def test_second_run_on_one_folder_says_so_and_changes_nothing(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    before = contents(tmp_path)
    with lock(tmp_path), pytest.raises(RuntimeError, match=re.escape(f"{tmp_path} is in use by another run")):
        pretrain(tokenizer, dataset, max_steps=4, output_dir=str(tmp_path))
    assert contents(tmp_path) == before


def test_folder_is_free_after_a_run_also_after_one_that_fails(tokenizer, dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "sandwich_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    with lock(tmp_path):
        pass


# Results that are of no use


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "no folder"])
@pytest.mark.parametrize(
    "changes", [{"weight_decay": math.inf}, {"weight_decay": math.nan}, {"learning_rate": math.inf}], ids=str
)
def test_weights_that_are_not_finite_are_no_result(tokenizer, dataset, eval_batches, tmp_path, changes, folder):
    """The arguments refuse such values. They stand for any other way to weights that are not finite."""
    args = arguments(max_steps=6, eval_steps=2, warmup_steps=0.0, output_dir=str(tmp_path) if folder else None)
    for name, value in changes.items():
        setattr(args, name, value)
    message = r"After step \d, weights are not finite \(the first: .*\), so the model of this step is of no use"
    with pytest.raises(FloatingPointError, match=message):
        super_pretrain(tiny_model(), tokenizer, dataset, args, eval_batches=eval_batches if folder else ())
    assert list_checkpoints(tmp_path) == []
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "last").exists()


def test_checkpoints_before_the_skipped_steps_are_kept(tokenizer, dataset, monkeypatch, tmp_path):
    """A checkpoint after each step, two are kept: without this rule both would be of the time after the blow-up."""
    poison(monkeypatch, {3, 4, 5, 6, 7})
    changes = {"max_steps": 9, "save_steps": 1, "max_skipped_steps": 4, "output_dir": str(tmp_path)}
    with pytest.raises(FloatingPointError, match=r"Newest checkpoint: .*checkpoint-00000003\.$"):
        pretrain(tokenizer, dataset, **changes)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-00000003", "checkpoint-00000002"]


def test_interruption_while_steps_are_skipped_removes_no_checkpoint(tokenizer, dataset, monkeypatch, tmp_path):
    poison(monkeypatch, {2, 3})
    changes = {"max_steps": 4, "save_steps": 1, "output_dir": str(tmp_path)}
    _, summary = pretrain(tokenizer, dataset, **changes)
    assert summary.progress.skipped_in_a_row == 2
    assert [folder.name[-1] for folder in list_checkpoints(tmp_path)] == ["4", "2", "1"]


def test_lower_learning_rate_is_applied_where_the_run_failed(tokenizer, dataset, monkeypatch, tmp_path):
    changes = {"max_steps": 6, "save_steps": 1, "max_skipped_steps": 2, "output_dir": str(tmp_path)}
    with monkeypatch.context() as patch:
        poison(patch, {2, 3, 4, 5})
        with pytest.raises(FloatingPointError, match=r"Lower learning_rate=0\.001"):
            pretrain(tokenizer, dataset, **changes)
    _, summary = pretrain(tokenizer, dataset, learning_rate=1e-5, lr_scheduler_type="constant", **changes)
    assert [record["learning_rate"] for record in step_records(summary)][2:] == [1e-5] * 4
    assert summary.arguments["learning_rate"] == 1e-5


def test_perplexity_that_overflows_can_be_saved(tokenizer, dataset, eval_batches, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.cls["predictions"].decoder.bias[0] = 1000.0
    changes = {"eval_steps": 1, "save_steps": 1, "output_dir": str(tmp_path)}
    pretrain(tokenizer, dataset, model, eval_batches=eval_batches, **changes)
    assert find_damage(list_checkpoints(tmp_path)[0]) is None


# Full disks


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "name", "file"),
    [
        (run_folder, "write_json", "run.json"),
        (run_folder, "save_for_hub", "best"),
        (progress, "to_json", "metrics.jsonl"),
        (progress, "plot_evaluations", "evaluation.png"),
        (run_folder, "to_json", "checkpoint-00000003"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_full_disk_is_named_with_the_file_and_what_to_do(
    tokenizer, dataset, eval_batches, tmp_path, monkeypatch, where, name, file
):
    monkeypatch.setattr(where, name, no_space)
    message = (
        rf"{re.escape(str(tmp_path / file))} could not be written: .*No space left on device.*\(is the disk full\?"
    )
    with pytest.raises(OSError, match=message):
        pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))


def test_full_disk_in_the_tokenizer_is_named_too(tokenizer, dataset, eval_batches, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"best could not be written: No space left on device \(os error 28\)\. Solve"):
        pretrain(tokenizer, dataset, eval_batches=eval_batches, output_dir=str(tmp_path))


def test_a_gpu_that_runs_out_of_memory_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), explained(tmp_path / "best", lambda: "Make room on the disk."):
        raise torch.OutOfMemoryError("CUDA out of memory")


# Machines


def test_no_tensor_of_64_bit_floats_is_made(tokenizer, dataset, eval_batches, tmp_path):
    """Apple GPUs have none. There is no such machine here, so every operation of a run is looked at."""
    found = set()

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                found.add(str(function))
            return result

    changes = {"eval_steps": 2, "save_steps": 2, "output_dir": str(tmp_path), "gradient_accumulation_steps": 2}
    with Look():
        torch.ones(1).double()
        assert found
        found.clear()
        pretrain(tokenizer, dataset, eval_batches=eval_batches, **changes)
        pretrain(tokenizer, dataset, eval_batches=eval_batches, max_steps=4, **changes)
    assert found == set()


def test_precision_of_the_launcher_is_checked(tokenizer, dataset, monkeypatch):
    class Fp8:
        mixed_precision = "fp8"

    monkeypatch.setattr(preparing, "start_accelerator", lambda **_: Fp8())
    with pytest.raises(ValueError, match=re.escape("mixed_precision='fp8' is unknown. Allowed: 'no', 'bf16', 'fp16'.")):
        pretrain(tokenizer, dataset)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_of_transformers_are_left_as_they_were(tokenizer, dataset, tmp_path, shown):
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        pretrain(tokenizer, dataset, max_steps=1, output_dir=str(tmp_path))
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize("name", CHOICES["lr_scheduler_type"])
def test_every_scheduler_that_the_arguments_allow_is_a_function_of_the_step(tokenizer, dataset, name):
    _, summary = pretrain(tokenizer, dataset, lr_scheduler_type=name, max_steps=2)
    assert all(0 <= record["learning_rate"] <= 1e-3 for record in step_records(summary))


def test_first_evaluation_and_checkpoint_leave_no_trace_in_the_weights(tokenizer, dataset, tmp_path):
    plain, _ = pretrain(tokenizer, dataset)
    saved, _ = pretrain(tokenizer, dataset, save_steps=1, output_dir=str(tmp_path))
    assert_same(copied_weights(saved), copied_weights(plain), atol=0)


def test_run_file_tells_the_conditions(tokenizer, dataset, tmp_path):
    pretrain(tokenizer, dataset, max_steps=1, output_dir=str(tmp_path))
    saved = json.loads((Path(tmp_path) / "run.json").read_text())
    assert saved["format"] == "supershaper-hf run 1"
    assert saved["conditions"]["learning_rate"] == 1e-3
    assert saved["conditions"]["text"].startswith(f"{len(dataset)} stored sequences")
