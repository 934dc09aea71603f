"""Two processes under torch's launcher know of each other, and the error of one ends the wait of the other.

The launcher runs `work`, at the end of this file, on each process.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import gather_object
from launching import launch

from supershaper_hf import processes
from supershaper_hf.processes import on_every_process, on_main_process, start_accelerator


class TwoArgumentsError(Exception):
    """Its constructor takes other arguments than those that pickle calls it with: `pickle.loads` fails."""

    def __init__(self, file, line):
        super().__init__(f"{file}, line {line}")


class PrefixError(Exception):
    """Pickle calls its constructor with its text: it comes back with two prefixes."""

    def __init__(self, text):
        super().__init__(f"prefix {text}")


class FunctionError(Exception):
    """`pickle.dumps` fails on what it holds."""

    def __init__(self, text):
        super().__init__(text)
        self.function = lambda: None


ERRORS = {
    "disk": OSError(28, "No space left on device", "records.jsonl"),
    "value": ValueError("first\nsecond"),
    "key": KeyError("epoch"),
    "memory": MemoryError(),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory."),
    "assertion": AssertionError(),
    "stop": StopIteration(3),
    "two arguments": TwoArgumentsError("records.jsonl", 7),
    "prefix": PrefixError("text"),
    "function": FunctionError("text"),
}
CHANGED = {  # what another process raises instead
    "two arguments": ["RuntimeError", "TwoArgumentsError: records.jsonl, line 7"],
    "prefix": ["RuntimeError", "PrefixError: prefix text"],
    "function": ["RuntimeError", "FunctionError: text"],
}


def described(error):
    return [type(error).__name__, str(error)]


def outcome(function, act, accelerator):
    """Return the result, or the type and the text of the error."""
    try:
        return function(act, accelerator)
    except Exception as error:
        return described(error)


def raising(error):
    def act():
        raise error

    return act


# Two processes


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Start both processes once, and return what each of them saw.

    As a user who does not know Accelerate would: with torch's launcher and no setting of Accelerate's.
    """
    folder = tmp_path_factory.mktemp("two_processes")
    process = launch(2, work, folder, log=folder / "log.txt")
    process.join(300)
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_plain_torchrun_without_a_gpu_is_seen(seen):
    assert [report["processes"] for report in seen] == [[0, 2], [1, 2]]


def test_result_of_the_main_process_is_that_of_all(seen):
    assert [report["result of main"] for report in seen] == [{"rank": 0}, {"rank": 0}]


def test_result_of_every_process_is_its_own(seen):
    assert [report["result of every"] for report in seen] == [{"rank": 0}, {"rank": 1}]


def test_only_the_main_process_acts_for_all(seen):
    assert [report["acted"] for report in seen] == [1, 0]


@pytest.mark.parametrize("name", ERRORS)
def test_error_of_the_main_process_is_raised_on_all(name, seen):
    own = described(ERRORS[name])
    assert [report["error of main"][name] for report in seen] == [own, CHANGED.get(name, own)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ERRORS)
def test_error_of_one_process_is_raised_on_all(name, rank, seen):
    own = described(ERRORS[name])
    expected = [own, CHANGED.get(name, own)] if rank == 0 else [CHANGED.get(name, own), own]
    assert [report[f"error of {rank}"][name] for report in seen] == expected


def test_each_process_raises_its_own_error_if_all_have_one(seen):
    assert [report["two errors"] for report in seen] == [["ValueError", "0"], ["ValueError", "1"]]


def test_result_that_cannot_be_sent_is_an_error_on_all(seen):
    message = ["TypeError", "A function cannot be sent to the other processes."]
    assert [report["function as result"] for report in seen] == [message, message]


def test_processes_still_talk_to_each_other_afterwards(seen):
    assert [report["afterwards"] for report in seen] == [[0, 1], [0, 1]]


# One process


@pytest.mark.parametrize("function", [on_main_process, on_every_process])
@pytest.mark.parametrize("with_accelerator", [False, True])
def test_single_process_acts_as_without_the_function(function, with_accelerator):
    accelerator = Accelerator(cpu=True) if with_accelerator else None
    unpicklable = lambda: None  # noqa: E731
    assert function(lambda: unpicklable, accelerator) is unpicklable
    for error in [*ERRORS.values(), KeyboardInterrupt(), SystemExit(3)]:
        with pytest.raises(type(error)) as raised:
            function(raising(error), accelerator)
        assert raised.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("function", [on_main_process, on_every_process])
def test_interruption_is_not_held_up_by_the_other_processes(function, error, monkeypatch):
    """Ctrl-C reaches all processes: this one must not wait for another that has ended."""
    for name in ("broadcast_object_list", "gather_object"):
        monkeypatch.setattr(processes, name, raising(AssertionError("It waits.")))
    with pytest.raises(error):
        function(raising(error()), SimpleNamespace(num_processes=2, is_main_process=True))


@pytest.fixture
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_single_process_is_one_process(fresh_state, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_accelerator().num_processes == 1


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_state_that_was_made_too_early_is_named(fresh_state, monkeypatch, name):
    """Made without the launcher's settings, it would let every process believe that it is alone."""
    PartialState()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "2")
    message = r"started 2 processes .* sees 1\. .* no Accelerator or PartialState before .* ACCELERATE_USE_CPU=true"
    with pytest.raises(RuntimeError, match=message):
        start_accelerator()


def work(folder):
    """Report what this process sees of the other one."""
    accelerator = start_accelerator()
    rank, acted = accelerator.process_index, []
    both = {"main": on_main_process, "every": on_every_process}
    report = {"processes": [rank, accelerator.num_processes]}
    for name, function in both.items():
        report[f"result of {name}"] = outcome(function, lambda: {"rank": rank}, accelerator)
    on_main_process(lambda: acted.append(rank), accelerator)
    report["acted"] = len(acted)
    report["error of main"] = {
        name: outcome(on_main_process, raising(error), accelerator) for name, error in ERRORS.items()
    }
    for failing in range(2):
        report[f"error of {failing}"] = {
            name: outcome(on_every_process, raising(error) if rank == failing else dict, accelerator)
            for name, error in ERRORS.items()
        }
    report["two errors"] = outcome(on_every_process, raising(ValueError(str(rank))), accelerator)
    report["function as result"] = outcome(on_main_process, lambda: lambda: None, accelerator)
    report["afterwards"] = gather_object([rank])
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(report, file)
    accelerator.end_training()
