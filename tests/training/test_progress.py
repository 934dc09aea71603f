import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from supershaper_hf.training import progress as progress_module
from supershaper_hf.training.arguments import SuperPretrainingArguments
from supershaper_hf.training.progress import SPIKE_WINDOW, Monitor, Progress, TrainingSummary


# Loss spikes


def quiet_losses(n, seed=0):
    """A falling loss with the noise of small batches."""
    generator = random.Random(seed)
    return [6.0 - 3.0 * step / n + generator.gauss(0, 0.1) for step in range(n)]


def watch(losses):
    """Return the steps at which a fresh `Progress` sees a spike."""
    progress, spikes = Progress(), []
    for progress.step, loss in enumerate(losses, start=1):
        if progress.watch(loss):
            spikes.append(progress.step)
    assert [spike["step"] for spike in progress.loss_spikes] == spikes
    return spikes


@pytest.mark.parametrize("seed", range(5))
def test_quiet_series_has_no_spike(seed):
    assert watch(quiet_losses(2000, seed)) == []


def test_jump_is_a_spike():
    losses = quiet_losses(200)
    losses[120] += 2.0
    assert watch(losses) == [121]


def test_drop_is_no_spike():
    losses = quiet_losses(200)
    losses[120] -= 2.0
    assert watch(losses) == []


def test_spike_is_remembered_with_the_mean_before_it():
    progress = Progress(step=51, recent_losses=[2.0, 4.0] * 25)
    assert progress.watch(9.5)
    assert progress.loss_spikes == [{"step": 51, "loss": 9.5, "mean_before": 3.0}]


def test_spike_is_more_than_six_deviations_above_the_mean():
    window = [2.0, 4.0] * 25  # mean 3, deviation 1
    assert not Progress(recent_losses=window).watch(8.99)
    assert Progress(recent_losses=window).watch(9.01)


def test_too_few_losses_have_no_spike():
    short = [2.0, 4.0] * 24 + [2.0]
    assert len(short) == SPIKE_WINDOW - 1
    assert not Progress(recent_losses=short).watch(100.0)
    assert Progress(recent_losses=[*short, 4.0]).watch(100.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_ignored(loss):
    progress = Progress(recent_losses=[2.0, 4.0] * 25)
    before = list(progress.recent_losses)
    assert not progress.watch(loss)
    assert progress.recent_losses == before
    assert progress.loss_spikes == []


def test_a_loss_is_compared_with_the_last_ones_only():
    progress = Progress()
    for loss in [9.0] * 30 + quiet_losses(SPIKE_WINDOW):
        progress.watch(loss)
    assert progress.recent_losses == quiet_losses(SPIKE_WINDOW)


def test_a_loss_that_stays_high_is_the_new_normal():
    spikes = watch([*quiet_losses(100), *[loss + 3 for loss in quiet_losses(200, seed=1)]])
    assert spikes[0] == 101
    assert len(spikes) <= 3


# The summary


def summary(records=(), processes=2, **changes):
    arguments = SuperPretrainingArguments(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=3,
        learning_rate=2e-4,
        random_shapes=4,
        seed=7,
        **changes,
    )
    progress = Progress(
        step=1234,
        sequences=59232,
        tokens=2500000,
        padded_tokens=2600000,
        labelled=400000,
        flops=1.5e15,
        seconds=5400.0,
        recent_losses=[1.0],
        best_loss=2.5,
        best_step=1000,
    )
    return TrainingSummary(
        "finished", progress, vars(arguments) | {"mixed_precision": "bf16"}, processes, "cpu", 4321, list(records)
    )


def test_summary_is_described_in_words():
    assert summary().describe() == (
        "Masked language modelling, the largest shape, the smallest and 4 random one(s) per step. 1,234 steps of 48 "
        "sequences: 2,500,000 tokens, 1.50e+15 FLOPs, 1.50 hours on 2 x cpu. AdamW, peak learning rate 0.0002 "
        "(linear), masking 15%, distillation weight 0.5, precision bf16, seed 7."
    )


@pytest.mark.parametrize(
    ("sampling", "words"),
    [("random", "Masked language modelling, 4 random shape(s) per step."), ("fixed", "modelling, one shape only.")],
)
def test_description_tells_the_sampling(sampling, words):
    description = summary(sampling=sampling).describe()
    assert words in description
    assert "distillation weight 0," in description


def test_description_tells_the_original_that_teaches():
    values = {"state_weight": 1.0, "pooled_weight": 0.5, "first_token_weight": 0.2, "pooling": "cls"}
    values["sampling"] = "smallest"
    options = {"no_dropout": True, "shared_learning_rate_scale": 0.1}
    unlabelled = summary(mlm_probability=0.0, **values, **options).describe()
    assert unlabelled.startswith(
        "Distillation from a frozen model, the smallest shape and 4 random one(s) per step. 1,234 steps"
    )
    assert unlabelled.endswith(
        "(linear), weights 1 of the last hidden state, 0.5 of its pooled form (cls), 0.2 of the first token's, 0 of "
        "attention relations, 0.1 of the learning rate for shared weights, no dropout, precision bf16, seed 7."
    )
    both = summary(**values).describe()
    assert both.startswith("Masked language modelling and distillation from a frozen model, the smallest shape and 4")
    assert "masking 15%, distillation weight 0, weights 1 of the last hidden state" in both


def test_description_tells_changed_conditions():
    done = summary()
    done.progress.changes = [{"step": 1000, "name": "learning_rate", "before": 2e-4, "after": 1e-4}]
    assert done.describe().endswith(
        "seed 7. The run went on under changed conditions: after step 1,000, learning_rate was changed from 0.0002 to "
        "0.0001."
    )


def evaluation(loss):
    return {"largest": {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.5}}


def test_evaluation_of_a_summary_is_the_last_one():
    records = [
        {"step": 1, "evaluation": evaluation(3.0)},
        {"step": 2, "loss": [2.9]},
        {"step": 2, "evaluation": evaluation(2.0)},
        {"step": 3, "loss": [1.9]},
    ]
    assert summary(records).evaluation == evaluation(2.0)


def test_summary_without_an_evaluation_has_none():
    assert summary([{"step": 1, "loss": [2.9]}]).evaluation == {}


def test_dictionary_of_a_summary_is_complete_and_survives_json():
    done = summary([{"step": 2, "evaluation": evaluation(2.0)}])
    told = done.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told == {
        "status": "finished",
        "step": 1234,
        "sequences": 59232,
        "tokens": 2500000,
        "padded_tokens": 2600000,
        "labelled": 400000,
        "flops": 1.5e15,
        "seconds": 5400.0,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
        "best_loss": 2.5,
        "best_step": 1000,
        "loss_spikes": [],
        "changes": [],
        "processes": 2,
        "device": "cpu",
        "parameters": 4321,
        "evaluation": evaluation(2.0),
        "arguments": vars(
            SuperPretrainingArguments(
                per_device_train_batch_size=8,
                gradient_accumulation_steps=3,
                learning_rate=2e-4,
                random_shapes=4,
                seed=7,
            )
        )
        | {"mixed_precision": "bf16"},
    }


# The monitor


class Clock:
    """Stands still but for what a test adds to `now`."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(progress_module, "matrix_product_rate", lambda *_: 1e6)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def monitor_of(progress, **changes):
    arguments = SuperPretrainingArguments(**{"max_steps": 100, "logging_steps": 1, **changes})
    return Monitor(Accelerator(), arguments, progress, "Test")


def advance(monitor, clock, seconds=2.0, tokens=10, flops=500_000.0, losses=(3.0, 4.0)):
    """One step that takes some time."""
    clock.now += seconds
    monitor.progress.step += 1
    monitor.progress.tokens += tokens
    monitor.progress.flops += flops
    monitor.step(losses=list(losses), learning_rate=1e-3, gradient_norm=0.5)


def test_record_of_a_step_is_complete(clock):
    monitor = monitor_of(Progress())
    advance(monitor, clock)
    record = {"step": 1, "loss": [3.0, 4.0], "learning_rate": 1e-3, "gradient_norm": 0.5}
    assert monitor.log_history == [record | {"tokens_per_second": 5.0, "share_of_peak": 0.25}]


@pytest.mark.parametrize(
    ("precision", "device", "full", "warned"),
    [
        ("bf16", "cpu", 7e9, True),
        ("bf16", "cpu", 1e9, False),
        ("bf16", "cuda", 7e9, False),
        ("no", "cpu", 7e9, False),
    ],
)
def test_processor_that_is_slower_in_half_precision_is_told(monkeypatch, precision, device, full, warned):
    messages = []
    monkeypatch.setattr(progress_module.logger, "warning", messages.append)
    rates = {"no": full, precision: full if precision == "no" else 1e9}
    monkeypatch.setattr(progress_module, "matrix_product_rate", lambda device, precision="no": rates[precision])
    accelerator = SimpleNamespace(
        device=torch.device(device),
        mixed_precision=precision,
        num_processes=2,
        is_main_process=True,
        is_local_main_process=False,
    )
    monitor = Monitor(accelerator, SuperPretrainingArguments(max_steps=1), Progress(), "Test")
    assert monitor.peak == 2 * rates[precision]
    expected = "in bf16 at 1 GFLOP/s, in float32 at 7 GFLOP/s. mixed_precision='no' is faster."
    assert len(messages) == warned
    assert all(message.endswith(expected) for message in messages)


def test_speed_is_that_since_the_last_record(clock):
    monitor = monitor_of(Progress(), logging_steps=2)
    for tokens, seconds in ((10, 1.0), (30, 1.0), (20, 2.0), (10, 3.0)):
        advance(monitor, clock, seconds, tokens)
    assert [(r["step"], r["tokens_per_second"]) for r in monitor.log_history] == [(2, 20.0), (4, 6.0)]


def test_last_step_has_a_record(clock):
    monitor = monitor_of(Progress(), logging_steps=2, max_steps=5)
    for _ in range(5):
        advance(monitor, clock)
    assert [record["step"] for record in monitor.log_history] == [2, 4, 5]


def test_pause_is_no_training_time(clock):
    monitor = monitor_of(Progress())
    advance(monitor, clock)
    with monitor.paused():
        clock.now += 50.0
    advance(monitor, clock)
    assert [record["tokens_per_second"] for record in monitor.log_history] == [5.0, 5.0]


def test_seconds_count_pauses_and_earlier_runs(clock):
    """They are the cost of the whole run."""
    monitor = monitor_of(Progress(step=10, seconds=300.0, tokens=1000, flops=1e9))
    advance(monitor, clock)
    with monitor.paused():
        clock.now += 50.0
    advance(monitor, clock)
    assert monitor.progress.seconds == 354.0


def test_speed_after_a_resume_counts_new_tokens_only(clock):
    monitor = monitor_of(Progress(step=10, seconds=300.0, tokens=1000, flops=1e9))
    advance(monitor, clock)
    assert monitor.log_history[0]["tokens_per_second"] == 5.0
    assert monitor.log_history[0]["share_of_peak"] == 0.25


def test_peak_is_that_of_all_processes(clock, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 4)
    monitor = monitor_of(Progress())
    advance(monitor, clock)
    assert monitor.log_history[0]["share_of_peak"] == 0.25 / 4


def test_spike_is_said_aloud(clock, capsys):
    monitor = monitor_of(Progress(recent_losses=[2.0, 4.0] * 25))
    advance(monitor, clock, losses=[12.5, 1.0])
    assert "Step 1: the loss is 12.50, up from 3.00." in capsys.readouterr().out
    assert len(monitor.progress.loss_spikes) == 1


def test_evaluation_is_recorded_and_shown_as_a_table(clock, capsys):
    monitor = monitor_of(Progress(step=6))
    monitor.evaluated(evaluation(2.0))
    assert monitor.log_history == [{"step": 6, "evaluation": evaluation(2.0)}]
    shown = capsys.readouterr().out
    assert "Evaluation after step 6:" in shown
    assert "largest  2.00        7.39      0.50" in shown


def test_nothing_is_written_without_a_folder(clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monitor = monitor_of(Progress())
    advance(monitor, clock)
    monitor.evaluated(evaluation(2.0))
    monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_records_are_written_as_they_come(clock, tmp_path):
    monitor = monitor_of(Progress(), output_dir=str(tmp_path / "run"))
    advance(monitor, clock)
    monitor.evaluated(evaluation(2.0))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == monitor.log_history
    assert (tmp_path / "run" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (2, ["1", "2", "2e"]), (3, ["1", "2", "2e", "3"]), (9, ["1", "2", "2e", "3"])]
)
def test_records_are_cut_back_to_the_step_to_go_on_from(clock, tmp_path, step, kept):
    """A crash left records after the last checkpoint, and half a line."""
    records = {
        "1": {"step": 1, "loss": [3.0]},
        "2": {"step": 2, "loss": [2.5]},
        "2e": {"step": 2, "evaluation": evaluation(2.0)},
        "3": {"step": 3, "loss": [2.0]},
    }
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records.values()) + '{"step": 4, "lo')
    monitor = monitor_of(Progress(step=step), output_dir=str(tmp_path))
    assert monitor.log_history == [records[name] for name in kept]
    advance(monitor, clock)
    read = [json.loads(line) for line in file.read_text().splitlines()]
    assert read == monitor.log_history
    assert read[-1]["step"] == step + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_damaged_line_takes_no_other_with_it(clock, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(progress_module.logger, "warning", said.append)
    good = [{"step": step, "loss": [3.0]} for step in (1, 2, 3)]
    damaged = [b"{", b"\xff\xfe", b"null", b'{"loss": [3.0]}', b'{"step": "1"}', b'{"step": NaN}', b"[" * 5000]
    damaged += [b'{"step": 1}', b'{"step": true, "loss": []}', b'{"step": 1, "loss": ["3"]}']
    damaged += [b'{"step": 1, "evaluation": ' + value + b"}" for value in (b"5", b'{"a": 1}', b'{"a": {"loss": 1}}')]
    lines = [json.dumps(good[0]).encode(), *damaged, json.dumps(good[1]).encode(), b"", json.dumps(good[2]).encode()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 4, "lo')
    monitor = monitor_of(Progress(step=9), output_dir=str(tmp_path))
    assert monitor.log_history == good
    numbers = ", ".join(str(number) for number in [*range(2, len(damaged) + 2), len(damaged) + 3])
    assert said == [f"{tmp_path / 'metrics.jsonl'} has damaged lines, which are left out: {numbers}."]


def test_other_processes_write_and_say_nothing(clock, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "on_main_process", lambda act, accelerator: None)
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    monkeypatch.setattr(Accelerator, "is_local_main_process", False)
    monitor = monitor_of(Progress(recent_losses=[2.0, 4.0] * 25), output_dir=str(tmp_path))
    advance(monitor, clock, losses=[12.5])
    monitor.evaluated(evaluation(2.0))
    monitor.close()
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
