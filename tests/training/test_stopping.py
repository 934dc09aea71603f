"""What stops a run before its last step: signals, and the end of the launcher."""

import os
import signal
import threading

import pytest
from training_runs import pretrain

from supershaper_hf.processes import start_accelerator
from supershaper_hf.training import loop as training_module
from supershaper_hf.training.checkpoints import list_checkpoints
from supershaper_hf.training.sandwich import sandwich_step
from supershaper_hf.training.stopping import Launcher, caught_signals


pytestmark = pytest.mark.usefixtures("no_measured_peak", "usual_signals")


@pytest.fixture
def usual_signals():
    """Python's own handler of Ctrl-C, which a job in the background of a shell lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_collected_and_a_second_one_acts_as_usual(number):
    acted = []
    signal.signal(number, lambda *_: acted.append(number))
    try:
        with caught_signals() as caught:
            assert caught == []
            signal.raise_signal(number)
            assert caught == [number]
            assert acted == []
            signal.raise_signal(number)
            assert caught == [number]
            assert acted == [number]
    finally:
        signal.signal(number, signal.SIG_DFL)


def test_second_interrupt_stops_at_once_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def interrupt_twice():
        with caught_signals():
            assert signal.getsignal(signal.SIGINT) != before[1]
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_run_restores_the_handlers(tokenizer, dataset):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    pretrain(tokenizer, dataset, max_steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_other_threads_cannot_catch_signals_and_do_without():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with caught_signals() as caught:
            seen.append((list(caught), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [([], before)]


def before_step(monkeypatch, number, act):
    """Let `act` be called when the step of this number, from 0, begins."""
    calls = []

    def sandwich(*args):
        if len(calls) == number:
            act()
        calls.append(1)
        return sandwich_step(*args)

    monkeypatch.setattr(training_module, "sandwich_step", sandwich)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_interrupted_run_says_so_and_leaves_the_rest_to_the_next_one(tokenizer, dataset, tmp_path, monkeypatch, step):
    """Also in the last of the three steps: who looks at the status does not go on to the next phase."""
    before_step(monkeypatch, step, lambda: signal.raise_signal(signal.SIGINT))
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert (summary.status, summary.progress.step) == ("interrupted", step + 1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == [f"checkpoint-0000000{step + 1}"]
    assert not (tmp_path / "last").exists()
    monkeypatch.undo()
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert (summary.status, summary.progress.step) == ("finished", 3)


def test_signal_while_the_last_model_is_written_acts_after_that(tokenizer, dataset, tmp_path, monkeypatch):
    save = training_module.RunFolder.save_model

    def save_and_signal(*args):
        signal.raise_signal(signal.SIGINT)
        save(*args)

    monkeypatch.setattr(training_module.RunFolder, "save_model", save_and_signal)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert (tmp_path / "last" / "model.safetensors").exists()


def test_launcher_that_is_gone_interrupts_the_run(tokenizer, dataset, tmp_path, monkeypatch):
    """The operating system gives the process another parent."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before_step(monkeypatch, 1, lambda: monkeypatch.setattr(os, "getppid", lambda: 1))
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert (summary.status, summary.progress.step) == ("interrupted", 2)
    assert len(list_checkpoints(tmp_path)) == 1


def test_launcher_that_died_before_the_first_step_is_missed_too(tokenizer, dataset, tmp_path, monkeypatch):
    """It may be killed in the hours that a script needs to prepare the text."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    start_accelerator()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    _, summary = pretrain(tokenizer, dataset, output_dir=str(tmp_path))
    assert (summary.status, summary.progress.step) == ("interrupted", 1)


def test_without_a_launcher_another_parent_means_nothing(monkeypatch):
    """The shell of a background job may end."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    launcher = Launcher()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not launcher.is_gone()
