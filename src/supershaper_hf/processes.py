"""What the processes of one run agree on: how many they are, and whether one of them has failed.

A process that raises an error while the others wait for it makes them wait for ever. `on_main_process` and
`on_every_process` let each process raise the error of any other one.
"""

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


Result = TypeVar("Result")


def start_accelerator(**options: Any) -> Accelerator:
    """Return an `Accelerator` that knows every process that a launcher has started.

    On a machine without a GPU, Accelerate takes each process of `torchrun` for the only one, unless it is told to use
    the CPU: all would train on the same data and write to the same folder. So it is told.

    Args:
        **options: Passed to `Accelerator`: `mixed_precision`, `log_with`, `kwargs_handlers`, ...

    Raises:
        RuntimeError: If Accelerate still sees another number of processes than the launcher started.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not torch.accelerator.is_available():
        options = {"cpu": True, **options}
    accelerator = Accelerator(**options)
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"The launcher started {launched} processes (WORLD_SIZE), but Accelerate sees {accelerator.num_processes}. "
            "Make no Accelerator or PartialState before this one, start with `accelerate launch`, and on machines "
            "without a GPU set ACCELERATE_USE_CPU=true."
        )
    return accelerator


def on_main_process(act: Callable[[], Result], accelerator: Accelerator | None) -> Result:
    """Let the main process `act`, and return its result on every process.

    Raises:
        Exception: On every process, what `act` has raised on the main one.
    """
    outcome: list[Any] = [None, None]
    if accelerator is None or accelerator.is_main_process:
        outcome = _outcome_of(act)
    if accelerator is not None and accelerator.num_processes > 1:
        outcome = broadcast_object_list([outcome[0], _portable(outcome[1])])
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_process(act: Callable[[], Result], accelerator: Accelerator | None) -> Result:
    """Let every process `act`, and return its own result on each.

    Raises:
        Exception: On every process, what `act` has raised on the first process where it has.
    """
    result, error = _outcome_of(act)
    errors = [error]
    if accelerator is not None and accelerator.num_processes > 1:
        errors = gather_object([_portable(error)])
    for error in errors:
        if error is not None:
            raise error
    return result


def main_process_first(act: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Let the main process `act` before the others, which then find in a cache what it has computed.

    Returns:
        The result of each process's own act.

    Raises:
        Exception: On every process, what `act` has raised on the first process where it has.
    """
    results: list[Result] = []
    if accelerator.num_processes > 1:

        def act_once() -> None:  # its result stays here: it may be too large to send
            results.append(act())

        on_main_process(act_once, accelerator)
    return on_every_process(lambda: results[0] if results else act(), accelerator)


def _outcome_of(act: Callable[[], Result]) -> list[Any]:
    try:
        return [act(), None]
    except Exception as error:  # whatever it is, the others have to hear of it
        return [None, error]


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that other processes can read: one that cannot be pickled becomes a RuntimeError."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
